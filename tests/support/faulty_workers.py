"""Processes for the benchmarks' runner that fail in every way. They import torch only where they really measure."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.suite.worker import serve

_SHARED: list[Any] = []  # the arguments of the process that measures


def nothing(*_: Any) -> None:
    """Announces nothing, prepares nothing."""


def provider(run: Callable[[Any], Any] = nothing, value: float = 1.0) -> Callable[[Any], Any]:
    """What an entry makes: runs `run`, its result is two such values."""
    import torch

    from benchmarks.suite.cases import Provider

    return lambda case: Provider(nothing, run, lambda: torch.full((2,), value))


def faulty_job(entries: dict[str, Any]) -> Callable[..., Any]:
    """Replaces `providers.job`: every workload has these entries and the exact result [1, 1]."""
    import torch

    from benchmarks.suite.providers import Job

    truth = torch.ones(2, dtype=torch.float64)
    return lambda workload, device: Job((2,), lambda seed: None, lambda: truth, lambda: 1e-5, 8, 1, entries)


def out_of_memory(draw: bool) -> None:
    raise MemoryError("no more")


def fail_drawing(draw: bool) -> None:
    if draw:
        raise ImportError("no source of noise")


def crash_when_timed(draw: bool, count: list[int] = [0]) -> None:  # noqa: B006 - counts calls
    count[0] += 1
    if count[0] > 2:
        os.kill(os.getpid(), signal.SIGSEGV)


def hang(draw: bool) -> None:
    """Let the runner believe that this has begun long ago, and wake it with a record."""
    pipe, _, since, *_ = _SHARED
    since.value -= 1e6
    pipe.send(("record", "hanging", {}))
    time.sleep(1000)


def hang_in_silence(draw: bool) -> None:
    Path(os.environ["HANGING"]).touch()
    time.sleep(1000)


def entries() -> dict[str, Any]:
    """Providers with and without faults."""
    from benchmarks.suite.providers import Entry

    return {
        "steady": Entry(provider()),
        "own": Entry(provider(), own=True),
        "wrong": Entry(provider(value=1.01)),
        "no numbers": Entry(provider(value=float("nan"))),
        "out of memory": Entry(provider(out_of_memory)),
        "absent": Entry(provider(), problem="needs a GPU"),
        "not to be counted": Entry(provider(fail_drawing)),
        "hanging": Entry(provider(hang)),
        "crashing": Entry(provider(crash_when_timed)),
    }


def serve_entries(chosen: Callable[[Any], dict[str, Any]], *arguments: Any) -> None:
    """Measure as the suite does, with the entries chosen by workload."""
    from benchmarks.suite import measure

    _SHARED[:] = arguments
    measure.job = lambda workload, device: faulty_job(chosen(workload))(workload, device)  # type: ignore[assignment]
    serve(*arguments)


def serve_faults(*arguments: Any) -> None:
    serve_entries(lambda workload: entries(), *arguments)


def serve_steadily(*arguments: Any) -> None:
    serve_entries(lambda workload: {name: entries()[name] for name in ("steady", "own")}, *arguments)


def serve_once_and_hang(*arguments: Any) -> None:
    """The first workload is measured; in the second one a provider hangs."""
    from benchmarks.suite.providers import Entry

    seen: list[Any] = []

    def chosen(workload: Any) -> dict[str, Any]:
        seen.append(workload)
        return {"steady": Entry(provider(hang_in_silence if len(seen) > 1 else nothing))}

    serve_entries(chosen, *arguments)


def serve_one(pipe: Any, *_: Any) -> None:
    name = pipe.recv()[0].name
    pipe.send(("record", name, {"turns": 1}))
    pipe.send(("done", "", None))


def serve_half(pipe: Any, *_: Any) -> None:
    pipe.send(("record", pipe.recv()[0].name, {"turns": 1}))
    time.sleep(1000)


def serve_nothing(*_: Any) -> None:
    os._exit(3)


def serve_errors(pipe: Any, *_: Any) -> None:
    pipe.recv()
    pipe.send(("not here", "diffusers is not installed", None))
    pipe.recv()
    pipe.send(("error", "KeyError: 'x'", None))
