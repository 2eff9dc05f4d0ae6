"""How a sampler runs: options that are fixed before the first call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ..ops import resolve_backend
from ..ops.backend import inductor_problem
from ..utils.checks import check_count
from .model_input import input_device, input_dtype

__all__ = ["COMPILE_MODES", "NO_CAPTURE", "SamplerConfig"]

# torch.compile's modes by our names. Graphs are captured by the engine, so torch must not capture its own.
COMPILE_MODES = {"default": "default", "max-autotune": "max-autotune-no-cudagraphs"}
# Capture policies that capture nothing, and the reason they give.
NO_CAPTURE = {"off": "graph=False", "never": "the device is a CPU"}

_CHOICES: dict[str, tuple[Any, ...]] = {
    "noise_source": ("philox", "torch", "brownian"),
    "graph": ("auto", True, False),
    "batching": ("auto", "batched", "serial"),
    "compile": (None, *COMPILE_MODES),
    "state_dtype": (torch.float32, torch.float64),
    "check_finite": (None, "raise", "warn"),
    "memory_format": (torch.contiguous_format, torch.channels_last),
}


@dataclass(frozen=True)
class SamplerConfig:
    """The options of a `Sampler`. They may be given to it one by one, or as one object that several share.

    Attributes:
        noise_source: where a step's noise comes from unless `sample` is given some: "philox" (drawn in the step; image
            i depends on its seed alone), "torch" (`torch.randn`, from the global generator without a seed) or
            "brownian" (drawn before the step, in one launch: increments of a path over the noise levels that depends on
            the seed alone, so that solvers of an SDE give the same picture in more steps).
        backend: "auto", "triton", "native" (CPUs), "inductor" (compiles for seconds, see `GuidedStep`) or "reference".
        graph: "auto" captures model and step as one CUDA graph where that is measured to be faster, and runs eagerly
            elsewhere; True captures without measuring (on a CPU, with the stand-in for graphs); False runs eagerly. A
            model that cannot be captured runs eagerly, with a warning that names the line to blame.
        batching: "batched" runs one forward for all branches, "serial" one for each; "auto" takes the faster one where
            graphs are measured, and else the first. The two may differ in the last bits.
        rows_per_graph: rows in one graph; 1 with callbacks, previews or adaptive guidance.
        compile: "default" or "max-autotune" has torch.compile compile the model, without graphs of its own.
        dtype: the model input's dtype; None takes the one in which the model computes, by its `dtype` property, its
            first floating parameter, or where it stores 8 bits, what it computes in; else float32.
        state_dtype: torch.float32, or torch.float64 on the reference path.
        device: None takes the one that a hook which offloads the model names, that of its first parameter, or the CPU.
        memory_format: torch.contiguous_format or torch.channels_last, for the model input.
        output: takes what the model returns to its output, a tensor; None reads tensors, tuples, and the dictionaries
            and objects that `fastcfg.engine.model_output.output_tensor` knows.
        check_finite: "raise" stops a run with NaN or infinity by a FloatingPointError that names the row, the sample,
            and the state or the branch in whose output they are; "warn" warns once (RuntimeWarning) and goes on. It is
            checked on the device, in one more pass, and read a row late; the host waits at the end alone.
        check_every: check every n-th row only, at the cost of naming the n rows.

    Raises:
        TypeError: output is not callable.
        ValueError: a value that is not one of those above.

    Example:
        >>> SamplerConfig(graph=False).rows_per_graph
        1
    """

    noise_source: str = "philox"
    backend: str = "auto"
    graph: str | bool = "auto"
    batching: str = "auto"
    rows_per_graph: int = 1
    compile: str | None = None
    dtype: torch.dtype | None = None
    state_dtype: torch.dtype = torch.float32
    device: torch.device | str | None = None
    memory_format: torch.memory_format = torch.contiguous_format
    output: Callable[[Any], Tensor] | None = None
    check_finite: str | None = None
    check_every: int = 1

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if not any(value is choice or (isinstance(value, str) and value == choice) for choice in choices):
                raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, choices))}")
        for name in ("rows_per_graph", "check_every"):
            object.__setattr__(self, name, check_count(name, getattr(self, name)))
        if self.dtype is not None and not (isinstance(self.dtype, torch.dtype) and self.dtype.is_floating_point):
            raise ValueError(f"dtype: got {self.dtype!r}, expected a floating dtype")
        if self.output is not None and not callable(self.output):
            raise TypeError(f"output: got {type(self.output).__name__}, expected a function or None")

    def resolved(self, model: Callable[..., Any]) -> SamplerConfig:
        """The same options with dtype, device and backend settled for a model.

        Raises:
            ValueError: a device that does not exist, weights on "meta" alone and no device, or a backend or
                torch.compile that cannot run on it.
        """
        device, dtype = _with_index(self.device or input_device(model)), self.dtype or input_dtype(model)
        if self.compile is not None and (problem := inductor_problem(device)):
            raise ValueError(f"compile: {self.compile!r} cannot run here: {problem}")
        return replace(
            self, dtype=dtype, device=device, backend=resolve_backend(self.backend, device, self.state_dtype)
        )

    def resolved_for(self, models: Sequence[Callable[..., Any]]) -> SamplerConfig:
        """`resolved` for several models that take turns, which must agree in what the config leaves open."""
        for model in models[1:]:
            first, other = (None if self.dtype else input_dtype(m) for m in (models[0], model))
            if first != other:
                raise ValueError(f"model: got one of {other} beside one of {first}, expected one dtype, or dtype=")
            first_on, other_on = (None if self.device else input_device(m) for m in (models[0], model))
            if first_on != other_on:
                raise ValueError(f"model: got one on {other_on} beside one on {first_on}, expected one device")
        return self.resolved(models[0])

    def __reduce__(self) -> Any:
        # With its default protocol torch.save cannot write a memory format: its name is written instead.
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return _config, (values | {"memory_format": str(self.memory_format)},)

    @property
    def capture(self) -> str:
        """What to do about graphs, of a resolved config: "always", "timed", or one of `NO_CAPTURE`."""
        if self.graph == "auto":
            return "timed" if times_graphs(self.device) else "never"  # type: ignore[arg-type]
        return "always" if self.graph else "off"


def _config(values: dict[str, Any]) -> SamplerConfig:
    memory_format = getattr(torch, values["memory_format"].removeprefix("torch."))
    return SamplerConfig(**values | {"memory_format": memory_format})


def times_graphs(device: torch.device) -> bool:
    """Whether graph="auto" measures graphs against eager runs on a device."""
    return device.type == "cuda"


def _with_index(device: torch.device | str) -> torch.device:
    """ "cuda" as "cuda:0": tensors name their device with its index."""
    try:
        found = torch.device(device)
        if found.type == "meta":
            raise RuntimeError("nothing can be computed on it")
        return torch.device("cuda", torch.cuda.current_device()) if found == torch.device("cuda") else found
    except (AssertionError, RuntimeError) as error:  # torch asserts that it was built for CUDA
        raise ValueError(f"device: got {str(device)!r}, expected 'cpu', or a GPU that torch sees ({error})") from error
