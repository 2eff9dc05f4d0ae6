"""How well the pictures follow their prompts, by network forwards per picture: `python -m benchmarks forwards`.

Forwards of the network are what a picture costs. Every combination of the solvers, steps, guidances, scales, intervals
and schedules given draws the same prompts from the same seeds with the embedded model, and
`fastcfg.training.shapes.judge` says which pictures show everything that was asked for (see `adherence`). A row without
guidance, outside the interval or after adaptive guidance has ended, takes one forward and not two.

--knee finds the cheapest way within one standard error of the best: ddpm in 50 steps with guidance 3, 100 forwards, as
benchmarks/results/cpu/adherence.json has it. The report's ways, cheapest first, draw more prompts until too many
pictures are wrong or all prompts are drawn. `fastcfg sample` uses what it finds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.adherence import HELD_OUT_SEED, digest
from benchmarks.command import add_device, add_json, parser_of, write_json
from benchmarks.environment import environment, load_average
from benchmarks.first_run import compare
from benchmarks.report.tables import aligned
from benchmarks.ways import GUIDANCE, Best, Measured, Way, allowed_failures, cheapest
from fastcfg.cli.outputs import check_output
from fastcfg.cli.parser import Parser, UsageError, choose_device, finite, integer, interval
from fastcfg.solvers.by_name import LEVELS, SOLVERS, SPACINGS
from fastcfg.utils.progress import progress_bar

if TYPE_CHECKING:
    from fastcfg.pipelines.text_to_image import TextToImage

RESULTS = Path(__file__).parent / "results" / "cpu"
PART = 32  # prompts after which the report is written; a multiple of it is drawn
GRID_PROMPTS, KNEE_PROMPTS = 64, 512

_EXAMPLES = """examples:
  python -m benchmarks forwards --json forwards.json --solver dpmpp_2m,ddim --steps 8,12 --scale 2,3
  python -m benchmarks forwards --json forwards.json --solver dpmpp_2m --steps 12 --interval 0:0.5,0.25:1
  python -m benchmarks forwards --json forwards.json --solver unipc --steps 12 --guidance adaptive --num-prompts 512
  python -m benchmarks forwards --json forwards.json --knee --plot forwards.png
  python -m benchmarks forwards --json forwards.json --demo 5
  python -m benchmarks forwards --json benchmarks/results/cpu/forwards.json --solver "" --plot docs/forwards.png

The report grows: pictures that the JSON file holds already are not drawn again, also after an interruption. 64 prompts
in 12 steps with two forwards each take about half a minute on a core."""


class Report:
    """The ways measured, and the file that they are written to; UsageError for a file that is not such a report, or
    one of other weights or prompts."""

    def __init__(self, path: str | None, settings: dict[str, Any], best: Best) -> None:
        self.path, self.settings, self.best = path, settings, best
        self.ways: dict[Way, Measured] = {}
        self.demo: dict[str, Any] | None = None
        if path is None or not Path(path).exists():
            return
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
            given, rows = found["settings"], [Measured.from_json(row) for row in found["ways"]]
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"argument --json: got {path!r}, which is no report to resume from") from error
        if given != settings:
            got = f"{path!r}, a report with {given}"
            raise UsageError(f"argument --json: got {got}, expected {settings} or another file")
        self.ways, self.demo = {row.way: row for row in rows}, found.get("demo")

    def add(self, measured: Measured) -> None:
        """Keep what was measured of a way, also in the file."""
        self.ways[measured.way] = measured
        self.write()

    def write(self) -> None:
        """Write the file, if there is one."""
        write_json(self.path, self.as_json())

    def as_json(self) -> dict[str, Any]:
        """The file's contents."""
        chosen = self.fast()
        report = {"schema": 1, "settings": self.settings, "best": self.best.as_json()}
        report["environment"] = environment(torch.device("cpu"), load_average()) | {"threads": torch.get_num_threads()}
        report["fast"] = None if chosen is None else chosen.as_json(verdicts=False)
        return report | {"demo": self.demo, "ways": [row.as_json() for row in self.by_cost()]}

    def fast(self) -> Measured | None:
        """The cheapest way within one standard error of the best, None if there is none yet."""
        return cheapest(self.ways.values(), self.best, KNEE_PROMPTS)

    def by_cost(self) -> list[Measured]:
        """All ways, cheapest first."""
        return sorted(self.ways.values(), key=lambda row: (row.forwards_per_picture, row.way.label()))


class Judged:
    """Draws pictures of held-out prompts and judges them."""

    def __init__(self, pipeline: TextToImage) -> None:
        from fastcfg.training.shapes.data import evaluation_prompts

        self._pipeline, self._prompts = pipeline, evaluation_prompts(KNEE_PROMPTS, HELD_OUT_SEED)

    def extend(self, row: Measured) -> Measured:
        """A way with the pictures of the next prompts; picture i has the seed i."""
        from fastcfg.training.shapes.judge import judge

        first = len(row.verdicts)
        part = self._prompts[first : first + PART]
        way, started = row.way, time.process_time()
        images = self._pipeline.sample(
            [text for text, _ in part],
            solver=way.solver,
            steps=way.steps,
            schedule=way.schedule,
            guidance=way.spec(),
            seed=list(range(first, first + len(part))),
            batch_size=PART,
        )
        seconds = time.process_time() - started
        pairs = zip(images.cpu().numpy(), part, strict=True)
        verdicts = "".join(str(int(judge(picture, scene).correct)) for picture, (_, scene) in pairs)
        return row.and_also(verdicts, len(part) * sum(self._pipeline.report()["branches"]), seconds)


def draw_all(report: Report, judged: Judged, ways: Iterable[Way], num_prompts: int) -> None:
    """Measure ways on so many prompts."""
    rows = [report.ways.get(way, Measured(way)) for way in ways]
    with progress_bar(total=sum(max(num_prompts - len(row.verdicts), 0) for row in rows), unit="picture") as bar:
        for row in rows:
            bar.set_description(row.way.label())
            while len(row.verdicts) < num_prompts:
                row = judged.extend(row)
                report.add(row)
                bar.update(PART)
            bar.write(described(row))


def find_knee(report: Report, judged: Judged, most: int | None) -> Measured | None:
    """Extend the ways, cheapest first, to the prompts of the best, until one is within its standard error; each stops
    where too many pictures are wrong. None where none of those up to `most` forwards a picture is."""
    allowed = allowed_failures(KNEE_PROMPTS, report.best.wanted)
    with progress_bar(total=len(report.ways), unit="way") as bar:
        for row in report.by_cost():
            bar.set_description(row.way.label())
            if most is not None and row.forwards_per_picture > most:
                break
            while len(row.verdicts) < KNEE_PROMPTS and row.verdicts.count("0") <= allowed:
                row = judged.extend(row)
                report.add(row)
            bar.update()
            if row.verdicts.count("0") <= allowed:
                return row
    return None


def described(row: Measured) -> str:
    """A way in a line."""
    told = f"{100 * row.fraction:.1f} ± {100 * row.standard_error:.1f} % of {len(row.verdicts)}"
    return f"{row.forwards_per_picture:6.1f} forwards  {told:<22} {row.way.label()}"


def table(report: Report) -> list[str]:
    """The ways as lines, cheapest first."""
    heads, cells = ("forwards", "follow, %", "prompts", "way"), []
    for row in report.by_cost():
        told = f"{100 * row.fraction:.1f} ± {100 * row.standard_error:.1f}"
        cells.append([f"{row.forwards_per_picture:.1f}", told, str(len(row.verdicts)), row.way.label()])
    return aligned(heads, cells)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    from fastcfg.pipelines.text_to_image import TextToImage

    arguments = _parser().parse_args(argv)
    if arguments.plot:
        check_output("--plot", arguments.plot, ".png")
    if arguments.num_prompts > KNEE_PROMPTS:
        raise UsageError(f"argument --num-prompts: got {arguments.num_prompts}, expected at most {KNEE_PROMPTS}")
    pipeline = TextToImage.load(None, choose_device(arguments.device))
    settings = {"weights_sha256": digest(pipeline), "prompts_seed": HELD_OUT_SEED, "batch": PART}
    report = Report(arguments.json, settings, Best.from_adherence(RESULTS / "adherence.json", settings))
    judged = Judged(pipeline)
    if arguments.knee:
        found = find_knee(report, judged, arguments.most)
        print("no way is within one standard error" if found is None else f"cheapest: {described(found)}")
    elif arguments.demo:
        report.demo = compare(pipeline, arguments.demo)
        report.write()
        print(
            "make demo: best {best_s:.2f} s, fast {fast_s:.2f} s; quartiles of the ratio {ratio}".format(**report.demo)
        )
    else:
        lists = (getattr(arguments, name) for name in ("solver", "steps", "scale", "guidance", "interval", "schedule"))
        draw_all(report, judged, itertools.starmap(Way, itertools.product(*lists)), arguments.num_prompts)
    if arguments.plot:
        from benchmarks.ways_plot import plot

        plot(report.ways.values(), report.best, report.fast(), arguments.plot)
    print("\n".join(table(report)))
    return 0


def _parser() -> Parser:
    parser = parser_of("forwards", __doc__, _EXAMPLES)

    def add(flag: str, metavar: str, text: str, kind: Any, default: list[Any]) -> None:
        shown = ",".join(map(_shown, default))
        parser.add_argument(
            flag, metavar=metavar, type=_several(kind), default=default, help=f"{text} (default: {shown})"
        )

    add("--solver", "S,S", "solvers by name", _one_of(SOLVERS), ["dpmpp_2m"])
    add("--steps", "N,N", "numbers of steps", integer(1), [8, 12])
    add("--scale", "S,S", "guidance scales", finite, [3.0])
    add("--guidance", "G,G", f"kinds of guidance, of {', '.join(GUIDANCE)}", _one_of(tuple(GUIDANCE)), ["cfg"])
    add("--interval", "A:B,A:B", "guided parts of the run", interval, [(0.0, 1.0)])
    add("--schedule", "S,S", "schedules by name, or none for the solver's own", _schedule, [None])
    count = f"of each way, of {KNEE_PROMPTS}; rounded up to a multiple of {PART} (default: %(default)s)"
    parser.add_argument("--num-prompts", metavar="N", type=integer(1), default=GRID_PROMPTS, help=f"prompts {count}")
    text = (
        f"instead of a grid: draw up to {KNEE_PROMPTS} prompts of the ways that may be the cheapest within one standard"
    )
    parser.add_argument("--knee", action="store_true", help=f"{text} error of the best")
    text = "no grid: time what `make demo` draws with each --quality, in so many turns"
    parser.add_argument("--demo", metavar="N", type=integer(1), help=text)
    parser.add_argument("--most", metavar="N", type=integer(1), help="with --knee: no way of more forwards a picture")
    add_device(parser)
    add_json(parser, f"report to write after every {PART} pictures, and to resume from")
    parser.add_argument("--plot", metavar="FILE", help="PNG of adherence over forwards")
    return parser


def _several(kind: Any) -> Any:
    return lambda text: [kind(part) for part in text.split(",") if part]


def _one_of(names: Sequence[str]) -> Any:
    def read(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"got {text!r}, expected some of {', '.join(names)}")
        return text

    return read


def _schedule(text: str) -> str | None:
    return None if text == "none" else str(_one_of((*LEVELS, *SPACINGS, "none"))(text))


def _shown(value: Any) -> str:
    return (
        ":".join(f"{edge:g}" for edge in value) if isinstance(value, tuple) else "none" if value is None else str(value)
    )
