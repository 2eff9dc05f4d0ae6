"""A change of the state: the kernel has the reference's bits, and touches nothing but what it writes."""

from __future__ import annotations

import ast
import math
import os
from typing import Any

import pytest
import torch
from support import ROOT
from torch import Tensor

from fastcfg import state_change
from fastcfg.ops import StateChange
from fastcfg.reference.philox import INITIAL_STREAM, STEP_STREAM
from fastcfg.state_change import FRESH_STREAM, NO_NORMALS, RENOISE_STREAM, TENSOR, KnownBuffers, StateSpec
from fastcfg.step import StepBuffers
from fastcfg.table import StepTable

interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs the Triton interpreter")

TABLE = StepTable.from_columns(t=[9, 5, 2, 1], c_in=[1.0, 0.7, 0.4, 0.2], p_m=1.0, a_0=1.0)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run(
    spec: StateSpec, shape: tuple[int, ...], backend: str, given: bool, row: int = 2, slots: int = 2, **options: Any
) -> dict[str, Tensor]:
    """What a change leaves: the state, the model's input and its time."""
    dtype, layout = options.get("dtype", torch.float16), options.get("layout", torch.contiguous_format)
    batch = shape[0]
    size = math.prod(shape)
    memory = torch.full((size + 4096,), math.nan)
    x = memory[:size].view(shape).copy_(normal(*shape))
    model_input = torch.full((slots * batch, *shape[1:]), math.nan, dtype=dtype).contiguous(memory_format=layout)
    counter = torch.tensor([row, 0], dtype=torch.int32)
    time = torch.zeros(slots * batch, dtype=torch.int64)
    seeds = torch.arange(batch) + 2**40
    buffers = StepBuffers(x, TABLE.on("cpu"), counter, seeds=seeds, model_input=model_input, time=time)
    known = None
    if spec.known:
        hold = torch.rand(shape, generator=torch.Generator().manual_seed(2))
        hold.view(-1)[::3], hold.view(-1)[1::3] = 0, 1
        rows = torch.rand(4, 5, generator=torch.Generator().manual_seed(3))
        known = KnownBuffers(normal(*shape, seed=4), hold, rows, normal(*shape, seed=5), normal(*shape, seed=6))
    StateChange(spec, buffers, known, backend)(normal(*shape, seed=8) if given else x)
    assert memory[size:].isnan().all()
    assert counter.tolist() == [row, 0]
    return {"x": x.clone(), "input": model_input, "time": time}


SPECS = {
    "given": StateSpec(),
    "given before": StateSpec(before=True),
    "known": StateSpec(known=True, noise=FRESH_STREAM),
    "known, of the start": StateSpec(True, True, noise=INITIAL_STREAM),
    "known, of the step": StateSpec(known=True, noise=STEP_STREAM, renoise=RENOISE_STREAM),
    "hard": StateSpec(True, True, True, TENSOR, RENOISE_STREAM),
    "no noise": StateSpec(known=True, noise=NO_NORMALS, renoise=TENSOR),
}


@interpreted
@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (1, 1, 1), (3, 5, 7, 31), (2, 4, 1100)], ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_the_kernel_has_the_bits_of_the_reference(name: str, shape: tuple[int, ...]) -> None:
    spec, given = SPECS[name], name.startswith("given")
    layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    want, got = (run(spec, shape, backend, given, layout=layout) for backend in ("reference", "triton"))
    for part, expected in want.items():
        assert expected.isfinite().all()
        assert torch.equal(got[part], expected), part


def test_the_model_is_given_the_state_of_the_row_that_follows() -> None:
    shape = (2, 3, 4, 4)
    for name in ("given", "given before"):
        found = run(SPECS[name], shape, "reference", True, dtype=torch.float32)
        assert torch.equal(found["x"], normal(*shape, seed=8))
        assert torch.equal(found["input"], (normal(*shape, seed=8) * torch.tensor(0.4)).repeat(2, 1, 1, 1))
        assert found["time"].tolist() == [2] * 4


def test_numbers_of_the_kernel_are_those_of_the_vocabulary() -> None:
    tree = ast.parse((ROOT / "kernels" / "state_change.py").read_text(encoding="utf-8"))
    assigned = [node for node in tree.body if isinstance(node, ast.Assign)]
    values = {ast.unparse(node.targets[0]): ast.literal_eval(node.value.args[0]) for node in assigned}
    assert values == {
        "NO_NORMALS": NO_NORMALS,
        "TENSOR": TENSOR,
        "KNOWN_WIDTH": len(state_change.KNOWN_COLUMNS),
    }


def test_buffers_that_do_not_fit_are_refused() -> None:
    x = normal(1, 1, 4)
    buffers = StepBuffers(x, TABLE.on("cpu"), torch.zeros(2, dtype=torch.int32))
    with pytest.raises(ValueError, match="known: got None, expected KnownBuffers"):
        StateChange(StateSpec(known=True), buffers)
    with pytest.raises(ValueError, match="hold: got"):
        StateChange(StateSpec(known=True), buffers, KnownBuffers(x, x[:, :, :2], torch.zeros(4, 5)))
    with pytest.raises(ValueError, match="rows: got"):
        StateChange(StateSpec(known=True), buffers, KnownBuffers(x, x, torch.zeros(3, 5)))
    with pytest.raises(ValueError, match="seeds: got None"):
        StateChange(StateSpec(known=True, noise=0), buffers, KnownBuffers(x, x, torch.zeros(4, 5)))
