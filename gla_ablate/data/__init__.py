"""Text and synthetic tasks by name. Nothing here imports lightning or datasets until data are read."""

from gla_ablate.data.hub import Hub
from gla_ablate.data.mqar import Mqar
from gla_ablate.data.source import DATA, DataSource, build_source, check_data
from gla_ablate.data.stdlib import Stdlib
from gla_ablate.data.text import Text

__all__ = ["DATA", "DataSource", "Hub", "Mqar", "Stdlib", "Text", "build_source", "check_data"]
