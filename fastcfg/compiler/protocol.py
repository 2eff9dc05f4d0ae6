"""What a scheduler of diffusers' protocol offers, in the forms that projects give it: its copies, its options, the
arguments of its `set_timesteps` and what its `step` returns."""

from __future__ import annotations

import copy
import operator
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import CellType, FunctionType, MethodType
from typing import Any, NamedTuple

from torch import Tensor

# The attribute of a fused class with the class it was made from (`frontends`).
ORIGINAL = "_fastcfg_original"
_OURS = "_fastcfg"
# Arguments of `set_timesteps` that say how many steps there are.
_OWN_LEVELS = ("timesteps", "sigmas")


class NextTimestep:
    """Stands for the timestep that follows, as an argument of `step`."""


def check_protocol(scheduler: Any) -> None:
    """ValueError for an object that is no scheduler, or whose noise comes from a Brownian tree."""
    name = type(scheduler).__name__
    for method in ("set_timesteps", "step"):
        if not callable(getattr(scheduler, method, None)):
            raise ValueError(f"scheduler: got {name} without {method}, expected diffusers' protocol")
    if hasattr(scheduler, "noise_sampler"):
        raise ValueError(f"scheduler: got {name} with a Brownian tree, expected independent draws")


def host_copy(scheduler: Any) -> Any:
    """A deep copy, of the class before it was fused, with its tensors in the host's memory. Methods replaced on the
    instance by functions that call its own are the copy's."""
    kind, memo = type(scheduler), dict[int, Any]()
    if hasattr(kind, ORIGINAL):
        # A class derived from a fused one remains what it is.
        twin: Any = object.__new__(vars(kind).get(ORIGINAL, kind))
        memo[id(scheduler)] = twin
        state = {name: value for name, value in vars(scheduler).items() if not name.startswith(_OURS)}
        twin.__dict__.update(copy.deepcopy(state, memo))
    else:
        twin = copy.deepcopy(scheduler, memo)
    for name, value in vars(twin).items():
        if isinstance(value, Tensor):
            vars(twin)[name] = value.cpu()
        elif isinstance(value, FunctionType):
            vars(twin)[name] = _bound_to(value, scheduler, twin)
    return twin


def _bound_to(value: Any, scheduler: Any, twin: Any, seen: frozenset[int] = frozenset()) -> Any:
    """A function whose captured and global references to a scheduler and its methods are to another one."""
    if value is scheduler:
        return twin
    if isinstance(value, MethodType):
        return MethodType(value.__func__, twin) if value.__self__ is scheduler else value
    if not isinstance(value, FunctionType) or id(value) in seen:
        return value
    seen |= {id(value)}
    known = {name: value.__globals__.get(name) for name in value.__code__.co_names}
    variables = {name: item for name, item in known.items() if not isinstance(item, FunctionType)}
    try:
        captured = [cell.cell_contents for cell in value.__closure__ or ()]
    except ValueError:  # a cell is still empty
        return value
    bound = {name: _bound_to(item, scheduler, twin, seen) for name, item in variables.items()}
    bound = {name: item for name, item in bound.items() if item is not variables[name]}
    cells = [_bound_to(item, scheduler, twin, seen) for item in captured]
    if not bound and all(new is old for new, old in zip(cells, captured, strict=True)):
        return value
    names = {**value.__globals__, **bound} if bound else value.__globals__
    function = FunctionType(
        value.__code__, names, value.__name__, value.__defaults__, tuple(map(CellType, cells)) or None
    )
    function.__kwdefaults__ = value.__kwdefaults__
    return function


@contextmanager
def unchanged(scheduler: Any) -> Iterator[None]:
    """Context in which copies of a scheduler run. ValueError, and its attributes as they were, if that changed it."""
    before = dict(vars(scheduler))
    if not any(map(callable, before.values())):  # its methods are its class's
        yield
        return
    after, changed = vars(scheduler), list[str]()
    try:
        yield
    finally:
        changed = [name for name in {**before, **after} if before.get(name, after) is not after.get(name, before)]
        if changed:
            after.clear()
            after.update(before)
    if changed:
        found = f"{type(scheduler).__name__} with a method of its own that changes its {', '.join(changed)}"
        raise ValueError(f"scheduler: got {found} where a copy runs, expected one that acts on the copy")


def option(scheduler: Any, name: str, default: Any = None) -> Any:
    """An option of a scheduler's `config`, as the scheduler reads it: the attribute, which may differ from the item of
    the same name; the default without either."""
    config = getattr(scheduler, "config", None)
    try:
        return getattr(config, name)
    except AttributeError:
        return config.get(name, default) if isinstance(config, Mapping) else default


def set_option(scheduler: Any, name: str, value: Any) -> None:
    """Set an option of a scheduler that is ours, by item and by attribute, wherever it was."""
    config = scheduler.config
    if isinstance(config, dict) and name in config:
        # diffusers' config refuses items.
        (OrderedDict if isinstance(config, OrderedDict) else dict).__setitem__(config, name, value)
    if hasattr(config, name):
        object.__setattr__(config, name, value)


def set_timesteps(scheduler: Any, count: Any, options: Mapping[str, Any]) -> Any:
    """A copy of a scheduler with timesteps set: a number of them, or the caller's own (`timesteps` or `sigmas` among
    the options), whose number may be given too.

    Raises:
        ValueError: not a number of steps, or another one than that of the caller's own.
    """
    own = next((name for name in _OWN_LEVELS if options.get(name) is not None), None)
    steps = None
    if count is not None or own is None:
        try:
            steps = operator.index(count)
        except TypeError:
            steps = 0
        if steps < 1 or isinstance(count, bool):
            raise ValueError(f"num_inference_steps: got {count!r}, expected an integer of at least 1")
    if own is None:
        return _with_timesteps(scheduler, steps, **options)
    try:
        number = len(options[own])
    except TypeError:
        raise ValueError(f"{own}: got {options[own]!r}, expected a sequence") from None
    # The last sigma of some is 0 and no step.
    if steps not in (None, number, number - (own == "sigmas")):
        raise ValueError(f"num_inference_steps: got {count!r} and {number} {own}, expected their number or None")
    try:
        return _with_timesteps(scheduler, **options)
    except ValueError as error:
        try:  # some want the number beside them
            return _with_timesteps(scheduler, number if steps is None else steps, **options)
        except ValueError:
            raise error from None


def _with_timesteps(scheduler: Any, *count: Any, **options: Any) -> Any:
    prepared = host_copy(scheduler)
    try:
        prepared.set_timesteps(*count, **options)
    except ValueError:
        raise
    except Exception as error:
        found = f"{type(scheduler).__name__}, whose set_timesteps fails ({type(error).__name__}: {error})"
        raise ValueError(f"scheduler: got {found}, expected arguments that it takes") from error
    return prepared


class StepResult(NamedTuple):
    """What a `step` returned: the next sample, and the predicted x0 where it says so."""

    sample: Tensor
    prediction: Tensor | None


def step_result(returned: Any) -> StepResult:
    """Read what a `step` returned: an object or mapping with `prev_sample`, a tuple, or the next sample itself.
    ValueError for anything else."""
    if isinstance(returned, Tensor):
        return StepResult(returned, None)
    if isinstance(returned, tuple | list) and not hasattr(returned, "prev_sample"):
        values, prediction = list(returned), None
    else:
        fields = returned if isinstance(returned, Mapping) else getattr(returned, "__dict__", {})
        sample = getattr(returned, "prev_sample", fields.get("prev_sample"))
        values = [sample, *(value for name, value in fields.items() if name != "prev_sample")]
        prediction = getattr(returned, "pred_original_sample", fields.get("pred_original_sample"))
    if not values or not isinstance(values[0], Tensor):
        expected = "a tensor, a tuple that begins with one, or an object with prev_sample"
        raise ValueError(f"scheduler: got a step that returns {type(returned).__name__}, expected {expected}")
    return StepResult(values[0], prediction if isinstance(prediction, Tensor) else None)
