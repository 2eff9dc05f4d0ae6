"""The step in plain torch: what the kernels equal (`table_step` and `pieces`), and the originals' own formulas
(`gaussian`)."""

from . import bound, gaussian, pieces
from .guided_step import ReferenceStep
from .table_step import Scratch, blend, table_step

__all__ = ["ReferenceStep", "Scratch", "blend", "bound", "gaussian", "pieces", "table_step"]
