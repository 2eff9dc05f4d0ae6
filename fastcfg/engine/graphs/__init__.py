"""Replay a fixed program on the same memory without its Python: as a CUDA graph, or on a CPU through a stand-in.

A program is a function without arguments or result that reads and writes tensors it was built with. `examine` records
its operations, finds what a graph could not capture, and keeps what it copies from the host; `CudaGraph` and `StandIn`
capture it, and `compare` checks the recording against the program.
"""

from .comparison import Comparison, compare
from .cuda import CudaGraph, Pool
from .errors import CaptureError
from .stand_in import Opaque, StandIn, is_compiled
from .trace import Examined, examine

__all__ = ["CaptureError", "Comparison", "CudaGraph", "Examined", "Opaque", "Pool", "StandIn", "compare", "examine"]
__all__ += ["is_compiled"]
