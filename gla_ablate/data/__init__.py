"""Text and synthetic tasks by name. Nothing here imports lightning or datasets until data are read."""

from gla_ablate.data.compression import Compression
from gla_ablate.data.fuzzy_recall import FuzzyRecall
from gla_ablate.data.hub import Hub
from gla_ablate.data.in_context_recall import InContextRecall
from gla_ablate.data.induction_heads import InductionHeads
from gla_ablate.data.memorization import Memorization
from gla_ablate.data.mqar import Mqar
from gla_ablate.data.noisy_recall import NoisyRecall
from gla_ablate.data.selective_copying import SelectiveCopying
from gla_ablate.data.source import DATA, DataSource, build_source, check_data, check_lengths
from gla_ablate.data.stdlib import Stdlib
from gla_ablate.data.text import Text

__all__ = [
    "DATA",
    "Compression",
    "DataSource",
    "FuzzyRecall",
    "Hub",
    "InContextRecall",
    "InductionHeads",
    "Memorization",
    "Mqar",
    "NoisyRecall",
    "SelectiveCopying",
    "Stdlib",
    "Text",
    "build_source",
    "check_data",
    "check_lengths",
]
