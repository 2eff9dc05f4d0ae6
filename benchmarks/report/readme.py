"""The results in README.md and docs/results.md from the committed ones: `python -m benchmarks readme [--check]`.

Text between `<!-- results:NAME -->` and `<!-- end -->`, in whichever file has the mark, is made from
benchmarks/results/*/: "gpu" from every folder but cpu/ that has a bench.json, the others from cpu/. Pictures go to
docs/FOLDER/, the machine code of all kernels (static_roofline.json) to docs/roofline.md.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.adherence import table as adherence
from benchmarks.command import parser_of
from benchmarks.ways import Way
from fastcfg.cli.parser import UsageError
from fastcfg.utils.files import write_text

from .plots import draw
from .reading import case, condition, duration, fastest, load, number, timed
from .summary import summary
from .tables import roofline, table

ROOT = Path(__file__).resolve().parents[2]
FILES = ("README.md", "docs/results.md")
SHAPES = ("pixel-64 b1", "pixel-64 b16", "latent-128 b1")
RIVALS = ("guided-diffusion", "GLIDE", "diffusers", "k-diffusion")
_BLOCK = re.compile(r"(<!-- results:(\w+) -->\n)(?:(?!<!-- ).*\n)*(?=<!-- end -->)")
_ROOFLINE = """# Machine code

Made by `python -m benchmarks static_roofline` (its `--help` explains the columns) on a machine without a GPU. Kernels
take a bfloat16 model unless the name says fp16 or fp32. The bound is the greater of bytes by the datasheet's bandwidth
and instructions by its issue rate.

"""
_NO_GPU = "No GPU result set exists yet: times, bandwidth and what graphs gain are not measured on one."


def steps(report: dict[str, Any]) -> str:
    """A step by shape and solver: fastcfg's fastest provider and the ratios to it, with noise given and drawn."""
    found = [r for r in report["results"].values() if r["kind"] == "step" and case(r) in SHAPES and fastest(r)[1]]
    pairs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in sorted(found, key=lambda r: (SHAPES.index(case(r)), r["noise"] == "drawn")):
        if result["dtype"] == found[0]["dtype"]:
            pairs.setdefault((case(result), result["solver"]), []).append(result)
    rows, ranges = [], [0.0]
    for key, pair in ((key, pair) for key, pair in pairs.items() if len(pair) == 2):
        own = [(r, name, r["providers"][name]) for r in pair for name in [fastest(r)[1]]]
        row = [*key, ", ".join(f"{name} {duration(found['us']['p50'])}" for _, name, found in own)]
        row.append(", ".join(number(found["of_copy"], ".0%") for *_, found in own if found.get("of_copy")))
        row.append(", ".join(duration(timed(r)["reference"]["us"]["p50"]) for r in pair if "reference" in timed(r)))
        for rival in RIVALS:
            ratios = [r["ratios"].get(name, {}).get(rival) for r, name, _ in own]
            ranges += [max(x["p80"] / x["p50"], x["p50"] / x["p20"]) - 1 for x in ratios if x]
            row.append(", ".join(f"{x['p50']:.1f}×" if x else "-" for x in ratios) if any(ratios) else "")
        rows.append(row)
    if not rows:
        return f"{condition(report)}: no step was measured."
    told = (
        f"{condition(report)}, {found[0]['dtype']}, torch {report['environment']['torch']}; how many times as long as "
    )
    told += f"fastcfg's fastest backend (medians; 20 to 80 % ranges within {max(ranges):.0%} of them):\n\n"
    return told + table(("shape", "step", "fastcfg: noise given, drawn", "of copy", "its reference", *RIVALS), rows)


def followed(report: dict[str, Any]) -> str:
    """How well pictures follow prompts, by guidance."""
    told = "{num_prompts} prompts, {solver}, {steps} steps; per cent ± one standard error:\n\n"
    return told.format(**report["settings"]) + "\n".join(adherence(report))


def ways(report: dict[str, Any]) -> str:
    """What pictures cost and how well they follow prompts, by the way they are sampled: those that drew all prompts."""
    best, fast, demo = report["best"], report["fast"], report["demo"]
    rows = []
    for row in [*report["ways"], best]:
        if row["num_prompts"] >= best["num_prompts"]:
            way = Way.from_json(row)
            name = {Way.from_json(best): ", `--quality best`", Way.from_json(fast): ", `--quality fast`"}.get(way, "")
            told = f"{100 * row['adherence']:.1f} ± {100 * row['standard_error']:.1f}"
            rows.append((way.label() + name, f"{row['forwards_per_picture']:.1f}", told))
    told = f"{best['num_prompts']} prompts; per cent ± one standard error. What `make demo` draws, 16 pictures, takes "
    told += f"{duration(demo['best_s'] * 1e6)} with best and {duration(demo['fast_s'] * 1e6)} with fast "
    threads = "1 thread" if demo["threads"] == 1 else f"{demo['threads']} threads"
    told += f"({report['environment']['device']}, {threads}; {demo['ratio'][1]:.1f}×):\n\n"
    return told + table(("solver and steps, guidance", "network forwards per picture", "fully correct"), rows)


def generated(text: str, results: Path, name: str = "README.md") -> str:
    """A file's text with its blocks made again; UsageError for a broken or unknown block."""
    cpu = results / "cpu"
    others = sorted({*results.glob("*/bench.json")} - {cpu / "bench.json"})
    blocks = {
        "steps": lambda: steps(load(cpu / "bench.json")),
        "roofline": lambda: roofline(load(cpu / "bench.json")["roofline"], ["main"]),
        "adherence": lambda: followed(json.loads((cpu / "adherence.json").read_text(encoding="utf-8"))),
        "forwards": lambda: ways(json.loads((cpu / "forwards.json").read_text(encoding="utf-8"))),
        "summary": lambda: summary(load(cpu / "bench.json"), json.loads((cpu / "schedulers.json").read_text())),
        "gpu": lambda: "\n\n".join(steps(load(path)) for path in others) or _NO_GPU,
    }
    names = [match[1] for match in _BLOCK.findall(text)]
    if len(names) != text.count("<!-- results:") or not blocks.keys() >= set(names):
        raise UsageError(f"{name}: got the blocks {names}, expected closed ones of {list(blocks)}")
    return _BLOCK.sub(lambda match: match[1] + blocks[match[2]]() + "\n", text)


def main(argv: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """The command for the checkout at `root`; its exit status."""
    parser = parser_of("readme", __doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if a file is out of date")
    check, results = parser.parse_args(argv).check, root / "benchmarks" / "results"
    old = {name: (root / name).read_text(encoding="utf-8") for name in FILES if (root / name).exists()}
    if not any("<!-- results:" in text for text in old.values()):
        raise UsageError(f"got no block in {' or '.join(FILES)}, expected `<!-- results:NAME -->`")
    new = {name: generated(text, results, name) for name, text in old.items()}
    if check:
        return int(new != old)
    for name, text in new.items():
        write_text(root / name, text)
    roof = results / "static_roofline.json"
    if roof.exists():
        write_text(root / "docs" / "roofline.md", _ROOFLINE + roofline(json.loads(roof.read_text())) + "\n")
    for path in results.glob("*/bench.json"):
        (folder := root / "docs" / path.parent.name).mkdir(parents=True, exist_ok=True)
        draw(load(path), folder)
    return 0
