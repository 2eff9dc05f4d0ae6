"""The reference step compiled by Inductor, torch.compile's code generator: the fused step where Triton cannot run.

torch.compile itself would guard every call, which on a CPU costs more than the step (DDIM at (1, 3, 64, 64): 180 µs a
call with guards, 60 µs without). Here the step is traced once for a known spec and tensor layout, and Inductor's code
is called directly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..reference import ReferenceStep
from ..reference._fma import addcmul_rounds_once
from ..step import StepBuffers, StepSpec
from ..utils._torch_private import fake_tensors, inductor_compile, inductor_fma
from .noise import step_noise

# The engine captures graphs itself. Loops run in threads from torch's own minimal size on: Inductor's default wakes
# threads for 512 elements (with 2 threads on a busy machine, a step of 12288 took 23 ms instead of 0.2).
_OPTIONS = {"triton.cudagraphs": False, "cpp.min_chunk_size": 32768}

# Name, dtype, shape, strides and device of a tensor.
_Layout = tuple[str, torch.dtype, tuple[int, ...], tuple[int, ...], torch.device]


class InductorStep:
    """`ReferenceStep`, compiled: on a CPU with the same bits.

    The first call with an output of a new layout compiles, for seconds; all steps of the process with the same spec,
    layouts and number of threads share the result. Coefficients are read from the table by the device counter: nothing
    compiled in changes from row to row.
    """

    def __init__(self, spec: StepSpec, buffers: StepBuffers) -> None:
        self._drawn: Tensor | None = None
        if spec.noise_source == "philox":
            # Drawn outside: compiling the generator takes Inductor ten times as long as the rest of the step.
            self._drawn = torch.empty_like(buffers.x)
            spec, buffers = replace(spec, noise_source="tensor"), replace(buffers, noise=self._drawn)
        self._spec, self._buffers = spec, buffers
        given = {name: tensor for name, tensor in vars(buffers).items() if tensor is not None}
        self._tensors = tuple(given.values())
        self._layouts = tuple(_layout(name, tensor) for name, tensor in given.items())
        self._compiled_for: tuple[object, ...] = ()
        self._compiled: Callable[..., object]

    def __call__(self, output: Tensor) -> None:
        """Args: output: the model's output [K*B, C or 2C, ...] in any floating dtype."""
        buffers = self._buffers
        if self._drawn is not None:
            step_noise(self._drawn, buffers.seeds, buffers.counter[0])  # type: ignore[arg-type]
        if torch.compiler.is_compiling():
            # The caller is being compiled: the step becomes part of it.
            ReferenceStep(self._spec, buffers)(output)
            return
        given = buffers.model_input
        if given is not None and output.untyped_storage().data_ptr() == given.untyped_storage().data_ptr():
            # The model returned its input; Inductor orders loops for tensors that do not overlap.
            output = output.clone()
        wanted = (output.dtype, output.shape, output.stride(), torch.get_num_threads())
        if wanted != self._compiled_for:
            self._compiled = _compile(self._spec, (_layout("output", output), *self._layouts), wanted[-1])
            self._compiled_for = wanted
        self._compiled(output, *self._tensors)


def _layout(name: str, tensor: Tensor) -> _Layout:
    return name, tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.device


@cache
@torch.inference_mode(False)
@torch.no_grad()
def _compile(spec: StepSpec, layouts: tuple[_Layout, ...], threads: int) -> Callable[..., object]:
    """The step as a function (output, *buffers) for tensors of these layouts. Inductor writes torch's number of threads
    into its loops, so `threads` is part of the key."""
    # Imported here: it takes a second that other backends need not spend.
    from torch.fx.experimental.proxy_tensor import make_fx

    names = [name for name, *_ in layouts[1:]]

    def step(output: Tensor, *tensors: Tensor) -> None:
        ReferenceStep(spec, StepBuffers(**dict(zip(names, tensors, strict=True))))(output)

    for device in {layout[-1] for layout in layouts}:
        addcmul_rounds_once(device)  # tried now: traced tensors have no values
    with fake_tensors():
        examples: list[Any] = [
            torch.empty_strided(shape, strides, dtype=dtype, device=device)
            for _, dtype, shape, strides, device in layouts
        ]
        graph = make_fx(step)(*examples)
    _round_once(graph)
    return inductor_compile(graph, examples, _OPTIONS)


def _round_once(module: torch.fx.GraphModule) -> None:
    """Replace addcmul, which Inductor compiles to a product and a sum on a CPU, by its fused multiply-add."""
    graph: Any = module.graph
    addcmul, copy = torch.ops.aten.addcmul, torch.ops.aten.copy_.default
    for node in [n for n in graph.nodes if n.op == "call_function" and n.target in (addcmul.default, addcmul.out)]:
        c, a, b = node.args
        with graph.inserting_before(node):
            result = graph.call_function(inductor_fma(), (a, b, c))
            if "out" in node.kwargs:
                result = graph.call_function(copy, (node.kwargs["out"], result))
        node.replace_all_uses_with(result)
        graph.erase_node(node)
    module.recompile()
