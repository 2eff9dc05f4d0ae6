"""The guided-step kernel under the interpreter is its torch reference, bit for bit, over every pair of options."""

from __future__ import annotations

import dataclasses
import math
import os
import random
from typing import Any

import numpy as np
import pytest
import torch
from support.pairwise import all_pairs, pairs_of, pairwise
from torch import Tensor

from fastcfg import solvers
from fastcfg.kernels.guided_step import LaunchConfig, launch_guided_step
from fastcfg.reference import ReferenceStep
from fastcfg.reference.philox import sample_seeds
from fastcfg.schedule import Schedule
from fastcfg.step import StepBuffers, StepSpec
from fastcfg.table import COLUMNS, DEVICE_COLUMNS, NO_NOISE

interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs the Triton interpreter")

FACTORS: dict[str, tuple[Any, ...]] = {
    "prediction": ("epsilon", "x0", "v", "previous_x", "random row"),
    "variance": ("fixed", "learned", "learned_range"),
    # A model may return variance channels that the solver ignores.
    "output channels": ("C", "2C"),
    "noise": ("none", "tensor", "philox"),
    "clip": ("off", "one bound", "bound per sample"),
    "rescale": (False, True),
    # K, and the base of the delta form or None for the weighted sum.
    "branches": ((1, None), (2, None), (2, 0), (2, 1), (3, None), (3, 0), (3, 1), (3, 2)),
    # Of the base too, and a tensor beside the branches.
    "scaled": (False, True),
    "momentum": (False, True),
    "conditional": ("first", "last"),
    "unconditional": ("unused", "first", "last"),
    "weights": ("one", "per sample", "per row", "per sample and row"),
    # Whether weights differ within a sample; "of one row": and all rows read the same memory.
    "weights by": ("sample", "channel", "element", "channel of one row", "element of one row"),
    # How many saved tensors, and the slots of the two rows.
    "history": ((0, -1, -1), (1, 0, -1), (1, -1, 0), (2, 1, 0), (2, 0, -1), (3, 0, 2), (3, 2, 1), (3, -1, -1)),
    "saves states": (False, True),
    "predicted": (True, False),
    "raw output": (False, True),
    "gradient": (False, True),
    "keep x0": (False, True),
    "dtype": (torch.float32, torch.float16, torch.bfloat16),
    "spatial": ((1,), (17,), (63,), (5, 7), (8, 8), (3, 4, 5)),
    "channels": (1, 3, 4),
    "batch": (1, 2, 5),
    "output layout": ("contiguous", "channels-last"),
    "input layout": ("contiguous", "channels-last"),
    "time": (torch.int64, torch.float32),
    "slots": (0, 1, 2, 3),
    "rows": ("first", "last"),
    # Elements per program; None leaves it to the launcher.
    "block": (64, 128, None),
}


def forbidden(case: dict[str, Any]) -> bool:
    """Learned variance needs noise, and the channels it is read from; dividing by the bound needs one; a weighted base
    needs a base, momentum a blend; states are saved tensors; x0 is predicted for all that needs it."""
    if case.get("saves states") and case.get("history", (1,))[0] == 0:
        return True
    takes_x0 = [case.get(name) for name in ("rescale", "gradient", "keep x0")] + [case.get("clip", "off") != "off"]
    if case.get("predicted") is False and (any(takes_x0) or case.get("raw output") is False):
        return True
    if case.get("clip") == "off" and case.get("rescale"):
        return True
    branches, base = case.get("branches", (2, 0))
    if (case.get("scaled") and base is None) or (case.get("momentum") and branches == 1):
        return True
    by_place = case.get("weights by", "sample") != "sample"
    if by_place and (branches == 1 or case.get("scaled") or case.get("momentum")):
        return True
    learned = case.get("variance") in ("learned", "learned_range")
    return learned and (case.get("noise") == "none" or case.get("output channels") == "C")


CASES = pairwise(FACTORS, forbidden)


def test_the_cases_hold_every_pair_of_options() -> None:
    covered = set().union(*map(pairs_of, CASES))
    assert all_pairs(FACTORS, forbidden) <= covered
    assert not any(map(forbidden, CASES))
    # As few as can be are 64, 8 branch forms x 8 histories; weights by place go with few of the others.
    assert len(CASES) == 70


class Guarded:
    """Tensors with a margin of sentinels around each, wider than any block or state here."""

    MARGIN = 2048

    def __init__(self) -> None:
        self._margins: list[Tensor] = []

    def copy(self, tensor: Tensor) -> Tensor:
        """A copy in the same dimension order in memory, with margins: NaN, or -77 in integers."""
        if len(tensor) > 1 and tensor.stride(0) == 0:
            return self.copy(tensor[:1]).expand_as(tensor)
        sentinel = math.nan if tensor.is_floating_point() else -77
        memory = torch.full((tensor.numel() + 2 * self.MARGIN,), sentinel, dtype=tensor.dtype)
        self._margins += [memory[: self.MARGIN], memory[-self.MARGIN :]]
        inner = memory[self.MARGIN : -self.MARGIN]
        if tensor.is_contiguous():
            return inner.view(tensor.shape).copy_(tensor)
        last = tensor.movedim(1, -1)
        assert last.is_contiguous()
        return inner.view(last.shape).movedim(-1, 1).copy_(tensor)

    def intact(self) -> bool:
        """Whether nothing was written outside the tensors."""
        return all(bool((m.isnan() if m.is_floating_point() else m == -77).all()) for m in self._margins)


def build(case: dict[str, Any], seed: int) -> tuple[StepSpec, StepBuffers, list[Tensor]]:
    """The spec, fresh buffers, and the model's outputs of two steps."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    (branches, base), (history, *slots) = case["branches"], case["history"]
    ends = {"first": 0, "last": branches - 1, "unused": None}
    spec = StepSpec(
        branches,
        base,
        conditional=ends[case["conditional"]],  # type: ignore[arg-type]
        unconditional=ends[case["unconditional"]],
        scaled=case["scaled"],
        momentum=case["momentum"],
        weights_by=case["weights by"].split()[0],
        learned_variance=case["variance"] != "fixed",
        predict_x0=case["predicted"],
        raw_output=case["raw output"],
        gradient=case["gradient"],
        history=history,
        saves_states=case["saves states"],
        clip=case["clip"] != "off",
        rescale=case["rescale"],
        noise_source=case["noise"],
        keep_x0=case["keep x0"],
    )
    batch, channels = case["batch"], case["channels"]
    shape = (batch, channels, *case["spatial"])
    table = build_table(case, seed, slots)
    rows = len(table) - 1

    weights = normal(rows, batch, branches + spec.momentum) * 3
    if "sample" not in case["weights"]:
        weights = weights[:, :1].expand_as(weights)
    if "row" not in case["weights"]:
        weights = weights[:1].expand_as(weights)
    if spec.weights_by != "sample":
        weights = place_weights(weights, shape[1:2] if spec.weights_by == "channel" else shape[1:], generator)
        weights = weights[:1].expand_as(weights) if "one row" in case["weights by"] else weights
    bound = normal(batch).abs() + 0.3
    bound = bound[:1].expand_as(bound) if case["clip"] == "one bound" else bound

    def model_tensor(rows: int, channels: int, layout: str) -> Tensor:
        tensor = normal(rows, channels, *case["spatial"]).to(case["dtype"])
        return tensor.movedim(1, -1).contiguous().movedim(-1, 1) if layout == "channels-last" else tensor

    buffers = StepBuffers(
        x=normal(*shape),
        table=table,
        counter=torch.tensor([0 if case["rows"] == "first" else rows - 2, 0], dtype=torch.int32),
        weights=None if branches == 1 else weights if "one row" in case["weights by"] else weights.contiguous(),
        bound=bound.contiguous() if spec.clip else None,
        noise=normal(*shape) if spec.noise_source == "tensor" else None,
        seeds=sample_seeds(2**63 - 2 + seed, batch) if spec.noise_source == "philox" else None,
        history=normal(history + 1, *shape) if history else None,
        gradient=normal(*shape) if spec.gradient else None,
        momentum=normal(*shape) if spec.momentum else None,
        x0=normal(*shape) if spec.keep_x0 else None,
        model_input=model_tensor(case["slots"] * batch, channels, case["input layout"]) if case["slots"] else None,
        time=torch.zeros(case["slots"] * batch, dtype=case["time"]) if case["slots"] else None,
    )
    width = channels * (1 + (case["output channels"] == "2C"))
    outputs = [model_tensor(branches * batch, width, case["output layout"]) for _ in range(2)]
    return spec, buffers, outputs


def place_weights(weights: Tensor, places: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """[R, B, K] varied over places, with zeros and ones among them."""
    weights = weights.view(*weights.shape, *[1] * len(places))
    numbers = torch.rand((*weights.shape[:3], *places), generator=generator)
    return torch.where(numbers < 0.3, 0.0, torch.where(numbers < 0.6, 1.0, weights * numbers))


def build_table(case: dict[str, Any], seed: int, slots: list[int]) -> Tensor:
    """A solver's table, or random rows; the columns no solver fills yet are random."""
    rng = random.Random(seed)
    numbers = torch.Generator().manual_seed(seed)
    if case["prediction"] == "random row":
        table = torch.randn(5, len(DEVICE_COLUMNS), generator=numbers)
        table[-1] = torch.tensor([{"c_in": 1.0, "slot": -1.0}.get(name, 0.0) for name in DEVICE_COLUMNS])
        table[:, COLUMNS.index("t")] = torch.arange(100, 105)
    else:
        schedule = Schedule.named(rng.choice(["linear", "cosine", "scaled_linear"])).respace(rng.randint(4, 9))
        if case["noise"] == "none":
            table = solvers.ddim(schedule, prediction=case["prediction"]).on("cpu")
        else:
            variance = "fixed_small" if case["variance"] == "fixed" else case["variance"]
            table = solvers.ddpm(schedule, prediction=case["prediction"], variance=variance).on("cpu")
    rows = table[:-1]
    for name in ("c_in", "a_u", "a_h0", "a_h1", "a_h2", "k_x", "k_0", "k_m", "p_g", "a_g"):
        rows[:, COLUMNS.index(name)] = torch.randn(len(rows), generator=numbers)
    if case["raw output"]:
        rows[:, COLUMNS.index("a_m")] += torch.randn(len(rows), generator=numbers)
    if case["time"] == torch.float32:
        rows[:, COLUMNS.index("t")] += 0.375
    first = 0 if case["rows"] == "first" else len(rows) - 2
    rows[:, COLUMNS.index("slot")] = 99.0
    rows[first : first + 2, COLUMNS.index("slot")] = torch.tensor(slots, dtype=torch.float32)
    return table


def map_tensors(function: Any, buffers: StepBuffers) -> StepBuffers:
    values = {name: None if value is None else function(value) for name, value in vars(buffers).items()}
    return dataclasses.replace(buffers, **values)


def poison_outputs(buffers: StepBuffers) -> None:
    """What a step must write wholly."""
    for tensor in (buffers.x0, buffers.model_input, buffers.time):
        if tensor is not None:
            tensor.fill_(math.nan if tensor.is_floating_point() else -77)


def bits(tensor: Tensor) -> Tensor:
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(integers[tensor.dtype.itemsize])


def assert_same(buffers: StepBuffers, expected: StepBuffers) -> None:
    for name, want in vars(expected).items():
        if want is None:
            continue
        got = getattr(buffers, name)
        if name == "history":
            # The last one is where the reference's rows without a slot write to.
            got, want = got[:-1], want[:-1]
        different = int((bits(got) != bits(want)).sum())
        assert different == 0, f"{name}: {different} of {want.numel()} differ, by up to {(got - want).abs().max()}"
        assert not want.is_floating_point() or not want.isnan().any(), name


@pytest.fixture
def numpy_exp2(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the reference the interpreter's exp2: numpy's, which differs from torch's in the last places."""

    def exp2(tensor: Tensor, out: Tensor | None = None) -> Tensor:
        with np.errstate(under="ignore"):
            result = torch.from_numpy(np.exp2(tensor.numpy()))
        return result if out is None else out.copy_(result)

    monkeypatch.setattr(torch, "exp2", exp2)


def describe(case: dict[str, Any]) -> str:
    return " ".join(str(value).removeprefix("torch.").replace(" ", "") for value in case.values())


@interpreted
@pytest.mark.usefixtures("numpy_exp2")
@pytest.mark.parametrize("index", range(len(CASES)), ids=lambda index: f"{index}: {describe(CASES[index])}")
def test_two_steps_are_the_reference_bit_for_bit(index: int) -> None:
    case = CASES[index]
    spec, expected, outputs = build(case, seed=index)
    guarded = Guarded()
    buffers = map_tensors(guarded.copy, expected)
    config = None if case["block"] is None else LaunchConfig(case["block"], 4)
    step = ReferenceStep(spec, expected)
    for output in outputs:
        poison_outputs(expected)
        poison_outputs(buffers)
        step(output)
        launch_guided_step(guarded.copy(output), spec, buffers, config)
        assert_same(buffers, expected)
    assert guarded.intact()


PLAIN: dict[str, Any] = {name: values[0] for name, values in FACTORS.items()} | {
    "branches": (2, 1),
    "spatial": (5, 7),
    "batch": 2,
    "slots": 2,
    "block": 64,
    "keep x0": True,
}


@interpreted
@pytest.mark.parametrize(("clip", "rescale"), [("off", False), ("one bound", False), ("one bound", True)])
def test_nan_and_infinity_come_through(clip: str, rescale: bool) -> None:
    spec, expected, (output, _) = build({**PLAIN, "clip": clip, "rescale": rescale}, seed=1)
    expected.x[0, 0, 0, :3] = torch.tensor([math.nan, math.inf, -math.inf])
    output[1, 0, 0, :3] = torch.tensor([math.nan, math.inf, -math.inf])
    buffers = map_tensors(Tensor.clone, expected)
    ReferenceStep(spec, expected)(output)
    launch_guided_step(output, spec, buffers, LaunchConfig(64, 4))
    for name in ("x", "x0", "model_input"):
        got, want = getattr(buffers, name), getattr(expected, name)
        assert want.isnan().any(), name
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@interpreted
def test_saved_tensors_without_a_slot_stay() -> None:
    spec, buffers, (output, _) = build({**PLAIN, "history": (3, -1, -1)}, seed=2)
    before = buffers.history.clone()  # type: ignore[union-attr]
    launch_guided_step(output, spec, buffers, LaunchConfig(64, 4))
    assert torch.equal(buffers.history, before)  # type: ignore[arg-type]


@interpreted
@interpreted
@pytest.mark.parametrize("history", [(0, -1, -1), (1, 0, 0), (3, 2, 1)], ids=str)
def test_a_step_that_predicts_no_x0_has_the_bits_of_one_that_does_not_use_it(history: tuple[int, int, int]) -> None:
    case = {**PLAIN, "prediction": "random row", "raw output": True, "history": history, "keep x0": False}
    spec, start, (output, _) = build(case, seed=4)
    for name in ("a_0", "k_0"):
        start.table[:, COLUMNS.index(name)] = 0
    results = []
    for predicted in (True, False):
        for launch in (launch_guided_step, lambda output, spec, buffers: ReferenceStep(spec, buffers)(output)):
            buffers = map_tensors(Tensor.clone, start)
            launch(output, dataclasses.replace(spec, predict_x0=predicted), buffers)
            results.append(buffers)
    for buffers in results[1:]:
        assert torch.equal(bits(buffers.x), bits(results[0].x))
        if history[0]:
            kept = (b.history[: history[0]] for b in (buffers, results[0]))  # type: ignore[index]
            assert torch.equal(*map(bits, kept))


def test_philox_noise_depends_on_the_row_and_on_the_seed_of_each_sample() -> None:
    case = {**PLAIN, "noise": "philox", "prediction": "random row"}
    spec, start, (output, _) = build(case, seed=3)

    def step(**changes: Tensor) -> Tensor:
        buffers = dataclasses.replace(map_tensors(Tensor.clone, start), **changes)
        buffers.table[:] = start.table[0]
        launch_guided_step(output, spec, buffers, LaunchConfig(64, 4))
        return buffers.x

    x = step()
    assert (step(counter=torch.tensor([1, 0], dtype=torch.int32)) != x).float().mean() > 0.99
    other = step(seeds=start.seeds + torch.tensor([0, 1]))  # type: ignore[operator]
    assert torch.equal(other[0], x[0])
    assert (other[1] != x[1]).float().mean() > 0.99


def test_exp2_of_torch_and_numpy_is_within_two_ulp() -> None:
    # log2 std of the solvers lies in [-7.8, 0] for variances in the learned range; "learned" ones may leave it.
    exponents = torch.linspace(-32, 8, 2**20)
    exact = np.exp2(exponents.double().numpy())
    ulp = np.spacing(exact.astype(np.float32)).astype(np.float64)
    # Measured: 0.85 and 0.99.
    errors = {
        "torch": np.abs(torch.exp2(exponents).double().numpy() - exact) / ulp,
        "numpy": np.abs(np.exp2(exponents.numpy()).astype(np.float64) - exact) / ulp,
    }
    assert {name: float(error.max()) for name, error in errors.items() if error.max() > 2} == {}
    assert torch.exp2(torch.tensor(NO_NOISE)) == 0
    assert np.exp2(np.float32(NO_NOISE)) == 0
