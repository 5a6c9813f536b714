"""A report's figures, each as PNG bytes, or None where it would say nothing.

Lines and points are named at the right, in the order in which they end there, so that nobody matches colours against a
legend; the palette (Okabe and Ito's, with two of Tol's) is safe for colour-blind eyes, and so is the heat map's.
"""

from gla_ablate.report.plots.cost import cost
from gla_ablate.report.plots.curves import curves
from gla_ablate.report.plots.factors import factor_effects
from gla_ablate.report.plots.heatmap import heat_map
from gla_ablate.report.plots.lengths import at_lengths
from gla_ablate.report.plots.memory import memory_lengths
from gla_ablate.report.plots.metric import metric_by_point

__all__ = ["at_lengths", "cost", "curves", "factor_effects", "heat_map", "memory_lengths", "metric_by_point"]
