"""The gates that come with this package, each a class with its formula and source. Importing it registers them.

None is the whole of the system that it is named after: the layer around it stays the same (`mixer.py`), which is what
makes gates comparable. Each class says what is left out.
"""

from gla_ablate.model.gate_family import data_dependent, data_independent, hgrn2, mamba2

__all__ = ["data_dependent", "data_independent", "hgrn2", "mamba2"]
