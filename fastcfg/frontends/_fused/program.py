"""What steps of one form have in common, as one Python function that fetches, draws, computes, builds and stores.

A step of few elements is a few dozen calls of Python: functions that call others for every part cost as much as all the
rest of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from ...compiler.step import Constant, Draw, Given, Means, Part, Small, Source, Sum, Write, laid_out
from ...utils._torch_private import in_function_transform
from .fall_through import FallThroughError

# Called with what is ready of a step, the scheduler's attributes, and the step's arguments.
Program = Callable[[Any, dict[str, Any], Tensor, Any, Tensor, Mapping[str, Any]], Any]
_CPU = torch.device("cpu")
_HEAD = "def program(ready, state, output, timestep, sample, options):"


def program_of(
    draws: Sequence[Draw],
    sources: Sequence[Source],
    dtypes: Sequence[torch.dtype],
    orders: Sequence[tuple[int, ...] | None],
    result: Part,
    writes: Sequence[Write],
) -> Program:
    """The function of a form: of a traced step with numbers in place of its constants. It returns the step's result;
    the scheduler's attributes are changed as by the original."""
    lines = _Lines()
    for number, draw in enumerate(draws):
        lines.add(f"noise{number} = {lines.named(partial(drawn, draw))}(sample, options)")
    if dtypes:
        _compute(lines, [lines.source(source) for source in sources], dtypes, orders)
    lines.add(f"result = {lines.part(result)}")
    # All values first: some are what other attributes were. Of the changes those first that may fail.
    writes = sorted(writes, key=lambda write: write.how != "copy")
    for number, write in enumerate(writes):
        lines.add(f"value{number} = {lines.part(write.part)}")
    for number, write in enumerate(writes):
        where = lines.source(write.source)
        changes = {"set": f"{where} = value{number}", "fill": f"{where}[:] = value{number}"}
        lines.add(changes.get(write.how, f"{where}.copy_(value{number})"))
    lines.add("return result")
    names: dict[str, Any] = {}
    exec(compile("\n    ".join([_HEAD, *lines.lines]), "<step>", "exec"), lines.names, names)
    found: Program = names["program"]
    return found


def _compute(
    lines: _Lines, inputs: list[str], dtypes: Sequence[torch.dtype], orders: Sequence[tuple[int, ...] | None]
) -> None:
    """Lines that compute the sums: on tensors like the last ones at once."""
    count, transformed = len(dtypes), lines.named(in_function_transform)
    sums, checks = [f"sum{j}" for j in range(count)], [f"check{k}" for k in range(len(inputs))]
    for k, value in enumerate(inputs):
        lines.add(f"input{k} = {value}")
    given = [f"input{k}" for k in range(len(inputs))]
    alike = " and ".join(f"{check}({value})" for check, value in zip(checks, given, strict=True))
    lines.add("combine = ready.combine", "again = combine.again")
    lines.add("if again is not None:")
    lines.add(f"    ({', '.join(checks)},), launch, _ = again")
    lines.add(f"    if {alike} and not {transformed}():")
    like = lines.named(torch.empty_like)
    for total, dtype in zip(sums, dtypes, strict=True):
        kind = lines.named(dtype)
        lines.add(f"        {total} = {like}(input0, dtype={kind})")
    addresses = ", ".join(f"{name}.data_ptr()" for name in (*given, *sums))
    lines.add(f"        launch({addresses})")
    lines.add("    else:", "        again = None")
    lines.add("if again is None:")
    lines.add(f"    {', '.join(sums)}, = combine(({', '.join(given)},), {lines.named(tuple(dtypes))})")
    for total, order in zip(sums, orders, strict=True):
        if order is not None:
            lines.add(f"{total} = {lines.named(laid_out)}({total}, {order})")


class _Lines:
    """Lines of Python, and the values that they name."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.names: dict[str, Any] = {}
        self._numbers = itertools.count()

    def add(self, *lines: str) -> None:
        """More of them."""
        self.lines += lines

    def named(self, value: Any) -> str:
        """A name for a value."""
        name = f"v{next(self._numbers)}"
        self.names[name] = value
        return name

    def key(self, key: Any) -> str:
        """A key of a list or dictionary."""
        return repr(key) if type(key) in (int, str) else self.named(key)

    def source(self, source: Source) -> str:
        """What is at a source."""
        kind, *keys = source
        if kind == "draw":
            return f"noise{keys[0]}"
        holder = {"state": "state", "option": "options"}.get(kind)
        return kind if holder is None else holder + "".join(f"[{self.key(key)}]" for key in keys)

    def part(self, part: Part) -> str:
        """A part of a result."""
        if isinstance(part, Sum):
            return f"sum{part.number}"
        if isinstance(part, Given):
            return self.source(part.source)
        if isinstance(part, Means):
            return "output[:, : sample.shape[1]]"
        if isinstance(part, Small):
            return f"{self.named(_small)}(state, ready.constants[{part.value}])"
        if isinstance(part, Constant):
            return f"ready.constants[{part.value}]"
        items = [self.part(item) for item in part.parts]
        if part.keys is not None:
            pairs = ", ".join(f"{self.key(key)}: {item}" for key, item in zip(part.keys, items, strict=True))
            return f"{self.named(part.kind)}(**{{{pairs}}})"
        listed = ", ".join(items)
        if part.kind is tuple:
            return f"({listed},)" if items else "()"
        return f"[{listed}]" if part.kind is list else f"{self.named(part.kind)}([{listed}])"


def drawn(draw: Draw, sample: Tensor, options: Mapping[str, Any]) -> Tensor:
    """The noise of a draw for a step's sample, by the function that the original calls."""
    moved = list[tuple[torch.Generator, Tensor]]()
    try:
        if draw.like:
            same = draw.dtype in (None, sample.dtype)
            return draw.function(sample if same else torch.empty_like(sample, dtype=draw.dtype))
        given: dict[str, Any] = {"dtype": draw.dtype}
        if draw.generator:
            given["generator"] = generator = options["generator"]
            if type(generator) is torch.Generator:
                if sample.is_cpu and generator.device.type == "cpu" and is_torch_s(draw.function):
                    return torch.randn(sample.shape, generator=generator, dtype=draw.dtype, device=_CPU)
            elif isinstance(generator, list):
                if 1 != len(generator) < len(sample):
                    raise ValueError("too few generators")  # before some of them are moved
                # Some draw before what is drawn is put together.
                moved = [(one, one.get_state()) for one in generator]
        if draw.device:
            given["device"] = sample.device
        noise = draw.function(sample.shape, **given)
        return noise if noise.is_cpu and sample.is_cpu else noise.to(sample.device)
    except Exception as error:  # the original says it
        for one, state in moved:
            one.set_state(state)
        raise FallThroughError(f"its noise cannot be drawn ({error})") from error


@lru_cache(64)
def is_torch_s(function: Callable[..., Tensor]) -> bool:
    """Whether a function is diffusers' `randn_tensor`, and draws from a generator of a CPU what `torch.randn` does in
    half of the time. Both are tried."""
    if (function.__module__, function.__qualname__) != ("diffusers.utils.torch_utils", "randn_tensor"):
        return False
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    for dtype in (torch.float32, torch.float16, None):
        found = function((2, 3, 9), generator=generators[0], device=_CPU, dtype=dtype)
        if not torch.equal(found, torch.randn((2, 3, 9), generator=generators[1], dtype=dtype, device=_CPU)):
            return False
    return torch.equal(generators[0].get_state(), generators[1].get_state())


def _small(state: Mapping[str, Any], constant: tuple[Tensor, dict[torch.device, Tensor]]) -> Tensor:
    """A new small tensor, where the levels are."""
    value, by_device = constant
    device = next((state[name].device for name in ("sigmas", "timesteps") if name in state), value.device)
    if device not in by_device:
        by_device[device] = value.to(device)
    copy: Tensor = by_device[device].clone()
    return copy
