"""The step in plain torch: what the kernels equal (`table_step` and `pieces`), and the originals' own formulas
(`originals`)."""

from . import bits_per_dim, originals, pieces
from .combine import ReferenceCombine
from .gram import gram, rescale_factor
from .guided_step import ReferenceStep
from .quantile import ReferenceBound, quantile_bound
from .state_change import ReferenceStateChange
from .table_step import Scratch, blend, table_step

__all__ = ["ReferenceBound", "ReferenceCombine", "ReferenceStateChange", "ReferenceStep", "Scratch", "bits_per_dim"]
__all__ += ["blend", "gram", "originals", "pieces", "quantile_bound", "rescale_factor", "table_step"]
