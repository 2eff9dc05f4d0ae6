"""`fastcfg methods`: every guidance method with its cost, read off a run of it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from .options import add_command

if TYPE_CHECKING:
    from fastcfg.engine.sampler import Sampler
    from fastcfg.guidance import Guidance

_DESCRIPTION = """\
List the guidance methods with their branches and the cost of a guided row: forward passes of a model for one sample,
and passes over the state beside the model (one, the fused step's; a second where the weights depend on the outputs, or
are read from a map).
Both are read off short runs of a small model, and so are the passes that options of a sampler add. The last line has
the names that `fastcfg sample --guidance` takes."""


def add_parser(commands: Any) -> None:
    """Add the command."""
    text = "list the guidance methods and what they cost"
    add_command(commands, "methods", run, help=text, description=_DESCRIPTION)


def run(arguments: argparse.Namespace) -> int:
    """Print the table."""
    from fastcfg.guidance.by_name import METHODS

    rows = [("method", "branches", "forwards", "passes")]
    for name, guidance in methods().items():
        forwards, passes = cost(guidance)
        rows.append((name, ", ".join(guidance.branches), str(forwards), str(passes)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print("\nMore passes with")
    for name, passes in option_costs().items():
        print(f"  {name.ljust(19)}{passes}")
    print(f"\n--guidance takes {', '.join(METHODS)}")
    return 0


def methods() -> dict[str, Guidance]:
    """An example of every method, by name."""
    from fastcfg import guidance as g

    specs: list[Guidance] = [g.NoGuidance(), g.CFG(), g.AdaptiveCFG(), g.Compose({"cond": 3.0, "other": 1.5})]
    specs += [g.InstructPix2Pix(), g.AutoGuidance(), g.PerturbedCFG(), g.CFGZeroStar(), g.APG(), g.APGMix()]
    specs += [g.TangentialCFG(), g.MagnitudeAwareCFG(), g.PerpNeg()]
    # Several methods have a rescale; it costs each of them the same.
    options = {"rescale=0.7": g.CFG(rescale=0.7), "channels=3": g.CFG(channels=3)}
    by_place: list[list[list[float]]] = [[[1.0, 2.0, 3.0, 4.0, 3.0, 2.0, 1.0, 0.0]]]
    return {type(spec).__name__: spec for spec in specs} | options | {"map": g.CFG(by_place)}  # type: ignore[arg-type]


def cost(guidance: Guidance) -> tuple[int, int]:
    """The most branches that a row evaluates, and its passes over the state."""
    import torch

    from fastcfg import Sampler, Schedule, solvers

    table = solvers.ddim(Schedule.named("linear").respace(20))
    sampler = Sampler(lambda x, t: torch.tanh(x), table, guidance=guidance, backend="reference", graph=False)
    sampler.sample((1, 4, 8), branches={name: {} for name in guidance.branches}, seed=0)
    report = sampler.report()
    return max(report["branches"]), max(program["passes"] for program in report["programs"])


def option_costs() -> dict[str, int]:
    """The passes over the state that options of a sampler and of `sample` add to a row."""
    found = {}
    for name, (sampler, arguments) in option_runs().items():
        sampler.sample((1, 1, 8), **arguments)
        found[name] = max(program["passes"] for program in sampler.report()["programs"])
    plain = found.pop("plain")
    return {name: passes - plain for name, passes in found.items()}


def option_runs(backend: str = "reference") -> dict[str, tuple[Sampler, dict[str, Any]]]:
    """Samplers and arguments of `sample`, for samples [1, 1, 8], by the option that they show."""
    import torch

    from fastcfg import CFG, ByRow, Sampler, Schedule, inpaint, solvers

    def model(x: torch.Tensor, t: torch.Tensor, text: Any) -> torch.Tensor:
        return torch.tanh(x + text["long"].mean(1)[:, :1, None])

    def prompt(length: int) -> dict[str, Any]:
        return {"text": {"long": torch.ones(1, length, 1)}}

    table, pixels = solvers.ddim(Schedule.named("linear").respace(20), eta=1.0), torch.zeros(1, 1, 8)
    given: dict[str, dict[str, Any]] = {
        "plain": {},
        "init, start, stop": {"init": pixels, "start": 5, "stop": 15},
        "lists of seeds": {"seed": [3]},
        "prompts by row": {"cond": ByRow(prompt(3), prompt(3), progress=0.5)},
        "lengths by branch": {"cond": prompt(5)},
        "models by row": {},
        "state_fn": {"state_fn": lambda x, x0, row: x},
        "inpaint": {"state_fn": inpaint(pixels, pixels)},
        "log_prob": {"log_prob": True},
        "check_finite": {},
    }
    runs = {}
    for name, options in given.items():
        models: Any = ByRow(model, model, progress=0.5) if name == "models by row" else model
        checked = "raise" if name == "check_finite" else None
        sampler = Sampler(models, table, guidance=CFG(3.0), backend=backend, graph=False, check_finite=checked)
        runs[name] = sampler, {"cond": prompt(3), "uncond": prompt(3), "seed": 0} | options
    return runs
