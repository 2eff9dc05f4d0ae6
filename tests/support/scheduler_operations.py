"""Operations on a scheduler and on what a pipeline holds beside it: what real code does from step to step.

An operation is a line of text: its name (`OPERATIONS`) and its arguments.
"""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

STATE = "_fastcfg"  # attributes of ours begin so


@dataclass(frozen=True)
class Call:
    """A call of `step`, and the scheduler as it was before."""

    before: Any
    method: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def snapshot(scheduler: Any) -> Any:
    """A scheduler with the same attributes; lists are copied, tensors are not."""
    kept = object.__new__(type(scheduler))
    for name, value in vars(scheduler).items():
        kept.__dict__[name] = list(value) if isinstance(value, list) else value
    return kept


@dataclass
class World:
    """One side: a scheduler, a second one to swap with, and what a pipeline holds."""

    scheduler: Any
    other: Any
    x: Tensor
    learned: bool
    position: int = 0
    noise: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(1))
    noises: list[torch.Generator] = field(
        default_factory=lambda: [torch.Generator().manual_seed(seed) for seed in range(2, 5)]
    )
    saved: Any = None
    kept: list[Tensor] = field(default_factory=list)  # every tensor passed to a step or returned by one
    passed: tuple[Tensor, Tensor] | None = None  # the last sample and output
    returned: list[Tensor] = field(default_factory=list)
    # The outputs of the model, which both sides are given: noted on the original's, played back on the other.
    tape: list[Tensor] = field(default_factory=list)
    playing: Iterator[Tensor] | None = None
    call: Call | None = None  # the last of `step`

    def generators(self) -> list[torch.Generator]:
        return [self.noise, *self.noises]

    def model(self, given: Any, t: Any) -> Tensor:
        """An elementwise one, in float32."""
        if self.playing is not None and (played := next(self.playing, None)) is not None:
            return played.clone()
        wide = torch.as_tensor(given).detach().float()
        time = float(torch.as_tensor(0.0 if t is None else t).reshape(-1)[0])
        output = torch.tanh(0.8 * wide + torch.sin(torch.tensor(0.01 * time))) + 0.1 * wide
        output = torch.cat([output, torch.cos(wide)], dim=1) if self.learned else output
        self.tape.append(output)
        return output.clone()


def new_world(scheduler: Any, shape: tuple[int, ...], drop_in: Callable[[Any], Any] = lambda same: same) -> World:
    """A side with the drop-in of a scheduler, and of a copy of it whose timesteps are set."""
    learned = "learned" in str(scheduler.config.get("variance_type"))
    size = float(getattr(scheduler, "init_noise_sigma", 1.0))
    x = size * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    other = drop_in(copy.deepcopy(scheduler))
    with suppress(Exception):
        _set_timesteps(other, 6)
    return World(drop_in(scheduler), other, x, learned)


# Functions of a side and the words of a line. What they return is compared.

OPERATIONS: dict[str, Callable[..., Any]] = {}


def _operation(function: Callable[..., Any]) -> Callable[..., Any]:
    OPERATIONS[function.__name__.rstrip("_")] = function
    return function


def _wave(like: Tensor, phase: float = 0.0) -> Tensor:
    """A tensor of the same shape that has nothing to do with it."""
    return torch.sin(torch.arange(like.numel()) * 1.7 + phase).reshape(like.shape)


@_operation
def set_(world: World, n: str, *words: str) -> None:
    """Set timesteps: a number, or `timesteps` or `sigmas` for lists; `keep` resumes with the sample there is."""
    scheduler = world.scheduler
    named = inspect.signature(scheduler.set_timesteps).parameters
    flow = float(getattr(scheduler, "init_noise_sigma", 1.0)) == 1.0
    listed = {"timesteps": [900, 600, 300, 20], "sigmas": [1.0, 0.7, 0.3] if flow else [9.0, 3.0, 0.5]}
    device = {"device": torch.device("cpu")} if "device" in words else {}
    if "keep" not in words:
        world.x = _wave(world.x) * 1.5 * float(getattr(scheduler, "init_noise_sigma", 1.0))
    world.position = 0
    if n in listed and n in named:
        scheduler.set_timesteps(**{n: listed[n]}, **device)
    else:
        _set_timesteps(scheduler, 4 if n in listed else int(n), **device)


def _set_timesteps(scheduler: Any, n: int, **kwargs: Any) -> None:
    shifted = scheduler.config.get("use_dynamic_shifting")
    scheduler.set_timesteps(num_inference_steps=n, **({"mu": 0.8} if shifted else {}), **kwargs)


@_operation
def begin(world: World, index: str) -> None:
    world.scheduler.set_begin_index(int(index))
    world.position = int(index)


def _length(scheduler: Any) -> int:
    timesteps = getattr(scheduler, "timesteps", None)
    return 1000 if timesteps is None or not len(timesteps) else len(timesteps)


def _timestep(world: World, way: str = "own") -> Any:
    timesteps = getattr(world.scheduler, "timesteps", None)
    if timesteps is None or len(timesteps) == 0:
        return 7
    last = len(timesteps) - 1
    moved = {"next": 1, "before": -1}.get(way, 0)
    t = timesteps[max(0, min(world.position + moved, last))]
    if way == "off":
        return 7
    ways: dict[str, Callable[[Any], Any]] = {
        "int": int,
        "float": float,
        "clone": lambda t: t.clone(),
        "batch": lambda t: t.expand(len(world.x)),
        "item": lambda t: t.item(),
    }
    return ways[way](t) if way in ways else t


def _in_place(x: Tensor) -> Tensor:
    return x.mul_(0.9)


_SAMPLES: dict[str, Callable[[Tensor], Tensor]] = {
    "own": lambda x: x,
    "clone": lambda x: x.clone(),
    "masked": lambda x: torch.where(_wave(x) > 0, x, _wave(x, 1.0).to(x)),
    "blended": lambda x: (0.5 + 0.5 * _wave(x)).to(x) * x + 0.2 * _wave(x, 2.0).to(x),
    "scaled": lambda x: x * 0.9,
    "inplace": _in_place,
    "fresh": lambda x: _wave(x, 3.0).to(x),
    "half": lambda x: x.half(),
    "bfloat16": lambda x: x.bfloat16(),
    "float": lambda x: x.float(),
    "double": lambda x: x.double(),
    "batch1": lambda x: x[:1],
    "batch4": lambda x: torch.cat([x, x * 0.5]),
    "narrow": lambda x: x[..., 1:],
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x,
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "strided": lambda x: torch.stack([x, x], dim=-1)[..., 0],
    "expanded": lambda x: x[:1].expand(x.shape),
    "empty": lambda x: x[:0],
    "integer": lambda x: x.long(),
    "parameter": torch.nn.Parameter,
}


def _huge(m: Tensor) -> Tensor:
    """Large numbers, but for variance channels: of a power of those rounding would be all that is left."""
    if m.ndim < 3 or m.shape[1] % 2:
        return m * 1e5
    means, variances = m.chunk(2, dim=1)
    return torch.cat([means * 1e5, variances], dim=1)


_OUTPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    name: _SAMPLES[name]
    for name in ("half", "bfloat16", "double", "channels_last", "transposed", "expanded", "batch1", "narrow")
}
_OUTPUTS |= {
    "zero": torch.zeros_like,
    "nan": lambda m: torch.where(_wave(m) > 0.9, torch.nan, m),
    "huge": _huge,
}
OPTIONS: dict[str, tuple[str, Any]] = {
    "eta": ("eta", 0.5),
    "clipped": ("use_clipped_model_output", True),
    "churn": ("s_churn", 0.6),
    "s_noise": ("s_noise", 1.1),
    "order": ("order", 2),
    "previous": ("prev_timestep", 5),
    "tuple": ("return_dict", False),
    "unknown": ("nonsense", 1),
}
_CONTEXTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}
# The words after `step`, by the argument they concern.
STEP_WORDS: dict[str, tuple[str, ...]] = {
    "t": ("int", "float", "clone", "item", "batch", "next", "before", "off", "past"),
    "sample": (*_SAMPLES, "given"),
    "output": (*_OUTPUTS, "same", "alias"),
    "noise": ("generator", "list", "long_list", "given", "both"),
    "option": tuple(OPTIONS),
    "context": (*_CONTEXTS, "grad"),
    "style": ("names", "positions"),
    "scale": ("no",),
    "method": ("step_plms", "step_prk"),
}


def _noise(world: World, way: str, sample: Tensor, named: Any) -> dict[str, Any]:
    kwargs: dict[str, Any] = {}
    if way in ("generator", "both") and "generator" in named:
        kwargs["generator"] = world.noise
    if way in ("list", "long_list") and "generator" in named:
        kwargs["generator"] = world.noises[: len(sample)] if way == "list" else [*world.noises, world.noise]
    if way in ("given", "both") and "variance_noise" in named:
        kwargs["variance_noise"] = _wave(sample, 4.0).to(sample.dtype)
    return kwargs


# Required arguments of steps of another protocol.
_FURTHER: dict[str, Callable[[World, Tensor, Any], Any]] = {
    "old_pred_original_sample": lambda w, x, t: w.returned[1] if len(w.returned) > 1 else None,
    "timestep_back": lambda w, x, t: None,
    "original_image": lambda w, x, t: _wave(x, 5.0),
    "mask": lambda w, x, t: (_wave(x) > 0).float(),
    "sigma_hat": lambda w, x, t: 2.0,
    "sigma_prev": lambda w, x, t: 1.0,
}


@_operation
def step(world: World, *words: str) -> dict[str, Any]:
    """A step of the loop of a pipeline, with what is not as in a tutorial named by words such as `sample=masked`."""
    chosen = dict(word.split("=") for word in words)
    scheduler, method = world.scheduler, chosen.get("method", "step")
    if not hasattr(scheduler, method):
        method = "step"
    call = getattr(scheduler, method)
    named = inspect.signature(call).parameters
    # Würstchen's timesteps are one for every sample.
    usual = "batch" if hasattr(scheduler, "_alpha_cumprod") else "own"
    if "t" not in chosen and world.position >= _length(scheduler):
        set_(world, "7")  # the run is over
    t, way = _timestep(world, chosen.get("t", usual)), chosen.get("sample", "own")
    seen: dict[str, Any] = {}
    with ExitStack() as stack:
        stack.enter_context(_CONTEXTS.get(chosen.get("context", ""), nullcontext)())
        sample = given = world.x if way == "given" else _SAMPLES[way](world.x)
        if wants_gradients := chosen.get("context") == "grad":
            sample = given = sample.detach().clone().requires_grad_()
        if hasattr(scheduler, "scale_model_input") and "scale" not in chosen:
            seen["given"] = given = scheduler.scale_model_input(sample, t)
            sample = given if way == "given" else sample
        output = world.model(given, t).to(sample.dtype)
        if wants_gradients:
            output = output + 0.3 * (torch.cat([sample, sample], dim=1) if world.learned else sample)
        way = chosen.get("output", "own")
        if way in _OUTPUTS:
            output = _OUTPUTS[way](output)
        elif way == "same" or (way == "alias" and world.passed is None):
            output = sample
        elif way == "alias":
            output = world.passed[1].copy_(output) if world.passed[1].shape == output.shape else output  # type: ignore[index]
        kwargs: dict[str, Any] = {n: further(world, sample, t) for n, further in _FURTHER.items() if n in named}
        kwargs |= _noise(world, chosen.get("noise", ""), sample, named)
        if "option" in chosen:
            name, value = OPTIONS[chosen["option"]]
            kwargs |= {name: value} if name in named or name == "nonsense" else {}
        first = {"model_output": output, "timestep": t, "sample": sample}
        if "sample_hat" in named:
            first = {"model_output": output, "sample_hat": sample}
        args: tuple[Any, ...] = ()
        if method == "step" and list(named)[:3] == list(first) and chosen.get("style") != "names":
            args, first = tuple(first.values()), {}
            if chosen.get("style") == "positions":
                args, kwargs = _by_position(args, kwargs, named)
        world.passed = (sample, output)
        world.call = Call(snapshot(scheduler), method, args, {**first, **kwargs})
        world.kept += [sample, output]
        seen["step"] = result = call(*args, **first, **kwargs)
        world.position += 1
        world.returned = [one for one in _values(result) if isinstance(one, Tensor)]
        world.kept += world.returned
        if world.returned:
            world.x = world.returned[0]
        if wants_gradients:
            seen["gradient"] = torch.autograd.grad(world.x.float().sum(), sample, allow_unused=True)[0]
            world.x = world.x.detach()
            world.call = None
    return seen


def _by_position(args: tuple[Any, ...], kwargs: dict[str, Any], named: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments by position as far as the defaults reach."""
    rest, values = dict(kwargs), list(args)
    for name, parameter in list(named.items())[3:]:
        if not rest or parameter.kind is not parameter.POSITIONAL_OR_KEYWORD:
            break
        values.append(rest.pop(name, parameter.default))
    return tuple(values), rest


def _values(result: Any) -> list[Any]:
    if isinstance(result, dict):
        return list(result.values())
    return list(result) if isinstance(result, list | tuple) else [result]


@_operation
def scale(world: World, way: str = "own") -> Any:
    return world.scheduler.scale_model_input(world.x, _timestep(world, way))


# Edits


@_operation
def poke(world: World, which: str, how: str) -> None:
    """Change one of the scheduler's attributes: the `which`-th in the order of their names, or the one of that name."""
    state = vars(world.scheduler)
    names = sorted(name for name in state if not name.startswith(STATE) and name != "_internal_dict")
    name = names[int(which) % len(names)] if which.isdigit() else which
    if name in state:
        state[name] = _changed(state[name], how, world.position)


def _changed(value: Any, how: str, position: int) -> Any:
    if how == "none":
        return None
    if isinstance(value, Tensor) and value.numel():
        return _changed_tensor(value, how, position)
    if isinstance(value, list):
        return _changed_list(value, how)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return {"less": value - 1, "zero": 0}.get(how, value + 1)
    if isinstance(value, float):
        return value * 1.01
    return value


def _changed_tensor(value: Tensor, how: str, position: int = 0) -> Tensor:
    exact = not value.is_floating_point()
    # One value, that of the step after the next; of tables over the training's timesteps all.
    place = min(position + 1, value.numel() - 1) if value.numel() < 100 else slice(None)
    flat = value.view(-1) if value.is_contiguous() else value[:1]
    if how == "inplace":
        flat[place] += 1 if exact else 0.05 * flat[place]
    elif how == "numpy":
        flat.detach().numpy()[place] *= 1 if exact else 1.03
    elif how == "data":
        flat.data[place] *= 1 if exact else 1.04
    elif how in ("half", "double") and not exact:
        return value.half() if how == "half" else value.double()
    elif how == "clone":
        return value.clone()
    elif how == "scale" and not exact:
        return value * 1.02
    return value


def _changed_list(value: list[Any], how: str) -> list[Any]:
    """Lists of what was saved: edited where they are, or replaced."""
    tensors = [i for i, one in enumerate(value) if isinstance(one, Tensor)]
    if how in ("inplace", "numpy", "data") and tensors:
        _changed_tensor(value[tensors[-1]], how)
    elif how == "less" and value:
        value.pop()
    elif how == "zero":
        value[:] = [None] * len(value)
    elif how == "list":
        return [None] * len(value)
    elif how in ("half", "double") and tensors:
        value[tensors[-1]] = _changed_tensor(value[tensors[-1]], how)
    elif how == "swap" and len(value) > 1:
        value[0], value[-1] = value[-1], value[0]
    elif tensors:
        value[tensors[-1]] = value[tensors[-1]] * 1.1
    return value


# What may stand in a config, and the values it is changed to.
CONFIG: dict[str, tuple[Any, ...]] = {
    "prediction_type": ("epsilon", "v_prediction", "sample", "flow_prediction"),
    "clip_sample": (True, False),
    "clip_sample_range": (0.7,),
    "thresholding": (True, False),
    "dynamic_thresholding_ratio": (0.8,),
    "sample_max_value": (1.5,),
    "solver_order": (1, 2, 3),
    "predictor_order": (1, 3),
    "corrector_order": (1, 3),
    "algorithm_type": ("dpmsolver++", "sde-dpmsolver++", "dpmsolver", "noise_prediction"),
    "solver_type": ("heun", "midpoint", "bh1", "bh2"),
    "lower_order_final": (False, True),
    "euler_at_final": (True,),
    "final_sigmas_type": ("sigma_min", "zero"),
    "predict_x0": (False,),
    "disable_corrector": ([0, 1, 2],),
    "variance_type": ("fixed_large", "fixed_small"),
    "use_karras_sigmas": (True,),
    "use_flow_sigmas": (True,),
    "timestep_spacing": ("trailing", "leading"),
    "steps_offset": (1,),
    "stochastic_sampling": (True,),
    "timestep_scaling": (5.0,),
    "eta": (0.3,),
    "s_noise": (1.2,),
    "shift": (2.0,),
    "num_train_timesteps": (900,),
}


@_operation
def config(world: World, name: str, which: str, way: str) -> None:
    """Change an option: by attribute, by item, or registered as diffusers' own methods do."""
    scheduler = world.scheduler
    if name not in scheduler.config:
        return
    value = CONFIG[name][int(which) % len(CONFIG[name])]
    if way == "attribute":
        setattr(scheduler.config, name, value)
    elif way == "item":
        dict.__setitem__(scheduler.config, name, value)
    elif way == "both":
        setattr(scheduler.config, name, value)
        dict.__setitem__(scheduler.config, name, value)
    else:
        scheduler.register_to_config(**{name: value})


@_operation
def edit(world: World, what: str, how: str = "scale") -> None:
    """Write into a tensor that a step was given or has returned."""
    tensors = {
        "sample": world.passed[:1] if world.passed else (),
        "output": world.passed[1:] if world.passed else (),
        "returned": world.returned[:1],
        "x0": world.returned[1:2],
    }[what]
    for tensor in tensors:
        if how == "zero":
            tensor.zero_()
        elif how == "data":
            tensor.data.mul_(0.8)
        else:
            tensor.mul_(0.8)


# States and copies


@_operation
def state(world: World, way: str) -> None:
    """Save the scheduler's attributes, restore them, or swap them with the second scheduler's."""
    mine, theirs = world.scheduler, world.other
    if way == "save":
        world.saved = dict(vars(mine))
    elif way == "deep_save":
        world.saved = copy.deepcopy(vars(mine))
    elif way == "restore" and world.saved is not None:
        mine.__dict__.update(world.saved)
    elif way == "replace" and world.saved is not None:
        mine.__dict__ = dict(world.saved)
    elif way == "give" and world.saved is not None:
        theirs.__dict__.update(world.saved)
    elif way == "swap":
        mine.__dict__, theirs.__dict__ = theirs.__dict__, mine.__dict__


@_operation
def switch(world: World) -> None:
    """Go on with the second scheduler."""
    world.scheduler, world.other = world.other, world.scheduler


def _torch_saved(value: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


_COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda scheduler: pickle.loads(pickle.dumps(scheduler)),
    "torch_save": _torch_saved,
    "from_config": lambda scheduler: type(scheduler).from_config(scheduler.config),
}


@_operation
def copied(world: World, way: str, goes_on: str) -> None:
    """Copy the scheduler, and go on with the copy or with the one copied; the other becomes the second scheduler."""
    made = _COPIES[way](world.scheduler)
    if type(made) is not type(world.scheduler):
        raise TypeError(f"the copy is a {type(made)}")
    if way == "from_config":
        _set_timesteps(made, 6)
    world.scheduler, world.other = (made, world.scheduler) if goes_on == "copy" else (world.scheduler, made)


# Other methods


@_operation
def call(world: World, name: str) -> Any:
    """A method or property that pipelines and training use beside the steps."""
    scheduler = world.scheduler
    if not hasattr(type(scheduler), name):
        return None
    if name == "__len__":
        return len(scheduler)
    timesteps = torch.as_tensor(_timestep(world)).reshape(1).expand(len(world.x))
    if name in ("add_noise", "get_velocity", "scale_noise"):
        arguments = (
            (world.x, timesteps, _wave(world.x)) if name == "scale_noise" else (world.x, _wave(world.x), timesteps)
        )
        return getattr(scheduler, name)(*arguments)
    found = getattr(scheduler, name)
    return found(_timestep(world)) if callable(found) else found


CALLS = ("add_noise", "get_velocity", "scale_noise", "__len__", "step_index", "begin_index", "order",
         "init_noise_sigma", "index_for_timestep", "previous_timestep", "state_in_first_order")  # fmt: skip
