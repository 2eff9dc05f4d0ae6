"""Checks with models of all kinds: weights that change, host tensors, what cannot be captured, compiled ones, failing
ones."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.captured.registry import Details, NotHereError, check, require, require_same
from benchmarks.captured.rig import Conv, build, conv, draw, no_eager_runs, require_captured
from fastcfg.ops.backend import inductor_problem

# Weights


class _Lora(nn.Module):
    def __init__(self, base: nn.Conv2d) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Conv2d(base.in_channels, base.out_channels, 1, bias=False).to(base.weight.device)
        nn.init.constant_(self.down.weight, 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.down(x)


def _in_place(model: Conv) -> None:
    with torch.no_grad():
        model.first.weight.mul_(0.5)


def _optimizer(model: Conv) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def _loaded(model: Conv) -> None:
    model.load_state_dict({name: 0.5 * value for name, value in model.state_dict().items()})


def _data(model: Conv) -> None:
    model.first.weight.data = model.first.weight.data * 0.5


def _new_parameter(model: Conv) -> None:
    model.first.weight = nn.Parameter(model.first.weight.detach() * 0.5)


def _lora(model: Conv) -> None:
    model.first = _Lora(model.first)  # type: ignore[assignment]


def _assigned(model: Conv) -> None:
    model.load_state_dict({name: 0.5 * value for name, value in model.state_dict().items()}, assign=True)


def _bfloat16_and_back(model: Conv) -> None:
    model.to(torch.bfloat16).to(torch.float32)


# How weights change, and whether their memory does. Where the allocator gives memory back at once, bfloat16 and back
# may end at the addresses it came from: those are compared.
_CHANGES: dict[str, tuple[Callable[[Conv], None], bool | None]] = {
    "in place": (_in_place, False),
    "an optimizer's step": (_optimizer, False),
    "load_state_dict": (_loaded, False),
    ".data =": (_data, True),
    "a new Parameter": (_new_parameter, True),
    "LoRA": (_lora, True),
    "load_state_dict(assign=True)": (_assigned, True),
    "to(bfloat16) and back": (_bfloat16_and_back, None),
}


def _addresses(model: nn.Module) -> dict[str, int]:
    return {name: value.data_ptr() for name, value in (*model.named_parameters(), *model.named_buffers())}


@check()
def changed_weights_act_at_the_next_call(device: torch.device) -> Details:
    """Weights changed in place or replaced give a fresh sampler's samples, and only replaced ones are captured anew."""
    captures = {}
    with no_eager_runs():
        for name, (change, expected) in _CHANGES.items():
            model = conv(device)
            sampler = build(device, model)
            first, before = draw(sampler), _addresses(model)
            change(model)
            replaced = _addresses(model) != before
            require(expected in (None, replaced), f"{name}: replaced {replaced}")
            second = draw(sampler)
            require(not torch.equal(second, first), f"{name}: nothing changed")
            require_same(second, draw(build(device, copy.deepcopy(model), graph=False)), name)
            require_same(second, draw(build(device, model)), f"{name}, a fresh sampler")
            require_captured(sampler)
            captures[name] = sampler.report()["captures"]
            require(captures[name] == 1 + replaced, f"{name}: {captures[name]} captures, memory replaced: {replaced}")
    return {"captures": captures}


# Host tensors


class _Upstream(Conv):
    """As guided-diffusion and GLIDE write it: frequencies are made on the CPU and copied in every call."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        half = 2
        frequencies = torch.exp(
            -math.log(10000) * torch.arange(start=0, end=half, dtype=torch.float32) / half
        ).to(device=t.device)  # fmt: skip
        args = t[:, None].float() * frequencies[None]
        embedded = self.time(torch.cat([torch.cos(args), torch.sin(args)], dim=-1)) + y[:, None]
        return torch.tanh(self.last(torch.tanh(self.first(x) + embedded[:, :, None, None])))


class _Listing(_Upstream):
    """Makes a tensor of numbers on the device in every call."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        mean = torch.tensor([0.1, 0.2, 0.3], device=x.device).view(1, 3, 1, 1)
        return super().forward(x - mean, t, y)


@check()
def tensors_of_the_hosts_become_constants(device: torch.device) -> Details:
    """Networks that copy tensors from the host in every call are captured, with those as the graph's constants.

    A CPU has nothing to copy, so no constants either.
    """
    found = {}
    with no_eager_runs():
        for kind, copies in ((_Upstream, 1), (_Listing, 2)):
            model = kind().to(device).eval()
            eager, captured = (build(device, model, graph=graph) for graph in (False, True))
            for seed in (0, 1):
                require_same(draw(captured, seed), draw(eager, seed), kind.__name__)
            require_captured(captured)
            constants = [program["constants"] for program in captured.report()["programs"]]
            want = [copies if device.type == "cuda" else 0]
            require(constants == want, f"{kind.__name__}: constants {constants}, not {want}")
            found[kind.__name__.strip("_")] = constants[0]
    return {"constants": found}


# What cannot be captured


class _Reading(Conv):
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return super().forward(x, t, y) * (0.5 if t[0].item() > 50 else 0.25)


class _Counting(Conv):
    calls = 0

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x, t, y) * (1 + 0.01 * self.calls)


class _Waiting(Conv):
    """What no dispatcher sees, so that only the capture itself fails."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        torch.cuda.current_stream().synchronize()
        return super().forward(x, t, y)


def require_usable(device: torch.device, stream: Any) -> None:
    """The stream is what it was, and torch's generator, allocator and captures work."""
    if device.type == "cuda":
        current = torch.cuda.current_stream(device)
        require(current == stream, f"the current stream is {current}, not {stream}")
    require(bool(torch.isfinite(torch.randn(1000, device=device)).all()), "torch.randn is broken")
    sampler = build(device)
    require_same(draw(sampler), draw(build(device, graph=False)), "another sampler, captured against eager")
    require_captured(sampler)


def _current_stream(device: torch.device) -> Any:
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


@check()
def what_cannot_be_captured_runs_eagerly(device: torch.device) -> Details:
    """A model that reads from the device, that changes by itself or that waits runs eagerly, after one warning."""
    lines = {_Reading: "t[0].item()", _Counting: "0.01 * self.calls"}
    if device.type == "cuda":
        lines[_Waiting] = "synchronize()"
    stream, told = _current_stream(device), {}
    for kind, line in lines.items():
        name = kind.__name__.strip("_")
        model: Any = kind().to(device).eval()
        sampler = build(device, model)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            draw(sampler)
            draw(sampler, shape=(1, 3, 8, 8))
            model.calls = 0
            result = draw(sampler)
        messages = [str(warning.message) for warning in caught if "running eagerly" in str(warning.message)]
        require(len(messages) == 1, f"{name}: {len(messages)} warnings in three calls: {messages}")
        right = line in messages[0] and "models.py:" in messages[0]
        require(right, f"{name}: the warning does not name the line with {line!r}: {messages[0]}")
        report = sampler.report()
        require(report["graph"] == "none", f"{name}: graph {report['graph']!r}")
        model.calls = 0
        require_same(result, draw(build(device, model, graph=False)), name)
        require_usable(device, stream)
        told[name] = messages[0]
    return {"warnings": told}


# Compiled models


@check()
def compiled_models_are_captured(device: torch.device) -> Details:
    """Captured equals eager bit for bit with compile="default", and with a model that the user has compiled."""
    if problem := inductor_problem(device):
        raise NotHereError(f"Inductor cannot compile here: {problem}")
    found = {}
    plain = draw(build(device, graph=False))
    with no_eager_runs():
        for name in ("compile='default'", "torch.compile"):
            if name == "torch.compile":
                captured = build(device, torch.compile(conv(device)), dtype=torch.float32)
                eager = build(device, captured.model, dtype=torch.float32, graph=False)
            else:
                captured = build(device, compile="default")
                eager = build(device, captured._callable(), dtype=torch.float32, graph=False)
            for seed in (0, 1):
                require_same(draw(captured, seed), draw(eager, seed), f"{name}, seed {seed}")
            require_captured(captured)
            distance = (draw(captured) - plain).abs().max().item()
            # Fused kernels round otherwise (1.2e-6 on a CPU); on a GPU TF32 may be used for other layers.
            require(
                distance < (2e-2 if device.type == "cuda" else 1e-5),
                f"{name}: {distance:.3g} from the model that is not compiled",
            )
            found[name] = distance
    return {"distance_from_not_compiled": found}


# Failures


class _Failing(Conv):
    """Raises at its n-th call from now."""

    countdown = -1
    error: type[BaseException] = RuntimeError

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.countdown -= 1
        if self.countdown == 0:
            raise self.error("the model failed")
        return super().forward(x, t, y)


@check()
def failures_leave_everything_usable(device: torch.device) -> Details:
    """An exception or an interrupt in any of the model's calls leaves sampler, stream, generator and allocator usable.

    The first three calls are the examination's, the fourth is the capture's, then come the comparison's.
    """
    stream, outcomes = _current_stream(device), {}
    want = draw(build(device, graph=False))
    for error in (ValueError, KeyboardInterrupt, RuntimeError):
        for call in range(1, 7):
            name = f"{error.__name__} at call {call}"
            model = _Failing().to(device).eval()
            model.countdown, model.error = call, error
            sampler = build(device, model)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="running eagerly")
                try:
                    draw(sampler)
                    outcomes[name] = "ran eagerly"
                except BaseException as raised:
                    require(type(raised) is error and "the model failed" in str(raised), f"{name}: {raised!r}")
                    outcomes[name] = "raised"
            # On CUDA an error of this type in a capture is CUDA's as a rule.
            eager = error is RuntimeError and call == 4 and device.type == "cuda"
            require(outcomes[name] == "raised" or eager, f"{name}: not raised")
            model.countdown = -1
            require_same(draw(sampler), want, f"the call after {name}")
            if outcomes[name] == "raised":
                require_captured(sampler)
        require_usable(device, stream)
    return {"outcomes": outcomes}
