"""Everything that needs a GPU, in one command and one time budget.

Stages run one after the other, each with a limit taken from what is left of the budget; one that fails or hangs does
not stop the others. After each, session.json in the output folder is written again.
Exit status: 0 if no stage failed, 1 if one did, 2 for bad arguments or without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from subprocess import DEVNULL, PIPE, STDOUT, Popen, TimeoutExpired
from typing import IO, Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
BUDGET = "<budget>"  # in a command: a little less than its limit
TAIL, LARGEST = 4_000, 200_000  # characters


@dataclass(frozen=True)
class Stage:
    """A part of the session.

    Attributes:
        name: the part's.
        command: what it runs; `BUDGET` in it becomes a time such as "200s".
        share: of the budget, relative to the other stages.
        file: what it writes: JSON, which is kept, or JUnit XML, which is summarized.
        skip: why it cannot be run; empty if it can.
    """

    name: str
    command: tuple[str, ...]
    share: float
    file: Path | None = None
    skip: str = ""


def all_stages(out: Path) -> list[Stage]:
    """The stages in order, for an output folder."""
    python = (sys.executable, "-m")

    def module(name: str, share: float, *arguments: str) -> Stage:
        options = () if BUDGET in arguments else ("--json", str(out / f"{name}.json"))
        return Stage(name, (*python, *arguments, *options), share, out / f"{name}.json")

    home, others = os.environ.get("CUDA_HOME", "/usr/local/cuda"), map(str, Path("/usr/local").glob("cuda*/bin"))
    places = [os.environ.get("PATH", os.defpath), f"{home}/bin", *sorted(others, reverse=True)]
    tool = shutil.which("compute-sanitizer", path=os.pathsep.join(places)) or ""
    # Every tensor an allocation of its own. And torch asks the driver for functions that it does without: no errors.
    checked = ("env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", tool, "--tool=memcheck", "--report-api-errors=no")
    short = ("--target-processes=application-only", "--error-exitcode=9", *python, "benchmarks.short_kernels")

    def tests(name: str, share: float, *paths: str) -> Stage:
        file = out / f"{name}.xml"
        return Stage(name, (*python, "pytest", "-m", "gpu", "-q", f"--junitxml={file}", *paths), share, file)

    loops = ("tests/gpu/test_captured_loop.py", "tests/engine/graphs/test_captured_loop.py")
    return [
        module("doctor", 30, "fastcfg", "doctor"),
        tests("tests", 130, "tests/gpu", f"--ignore={loops[0]}"),
        module("parity", 50, "fastcfg", "parity", "--quick"),
        tests("captured", 60, *loops),
        Stage("sanitizer", (*checked, *short), 60, None, "" if tool else "compute-sanitizer is not installed"),
        module("bench", 210, "benchmarks", "--budget", BUDGET, "--out", str(out)),
        module("trace", 30, "benchmarks", "trace"),
    ]


def limits(stages: Sequence[Stage], seconds: float) -> list[float]:
    """Each stage's limit if all before it use up theirs; what they save goes to the rest."""
    shares = [0.0 if stage.skip else stage.share for stage in stages]
    return [seconds * share / (sum(shares) or 1.0) for share in shares]


def run(stages: Sequence[Stage], out: Path, budget: float, environment: Any, begin: float) -> dict[str, Any]:
    """Run stages within a budget that runs since `begin` (of `time.monotonic`), and keep session.json up to date.

    Returns the report: of a stage its status ("ok", "failed", "skipped" or "timed out"), seconds, limit_s, reason,
    summary, json (the name of a file beside it) and tail (the output's end).
    """
    from fastcfg.utils.files import write_text  # imports torch, whose seconds count

    out.mkdir(parents=True, exist_ok=True)
    report = {"schema": 1, "finished": False, "environment": environment, "budget_s": budget, "stages": {}}
    for index, stage in enumerate(stages):
        left = begin + budget - time.monotonic() - 2.0  # for killing the last and writing reports
        result = report["stages"][stage.name] = _made(stage, limits(stages[index:], max(left, 0.0))[0])
        report |= {"finished": stage is stages[-1], "seconds": round(time.monotonic() - begin, 1)}
        write_text(out / "session.json", json.dumps(report, indent=1) + "\n")
        told = result["reason"] or json.dumps(result["summary"])[:300]
        print(f"{stage.name}: {result['status']} ({result['seconds']} of {result['limit_s']} s): {told}", flush=True)
    return report


def _made(stage: Stage, limit: float) -> dict[str, Any]:
    status, reason, tail, summary, kept = "skipped", stage.skip, "", None, None
    start, wall = time.monotonic(), time.time() - 0.1  # files' times are coarse
    try:
        if not stage.skip:
            status = "failed"
            with tempfile.TemporaryFile() as log:
                status, reason = _executed(stage, limit, log)
                log.seek(max(0, log.seek(0, os.SEEK_END) - 4 * TAIL))
                said = log.read().decode(errors="replace").replace(str(ROOT), ".")
                tail = re.sub("\nExtension modules: .*", "", said)[-TAIL:]  # faulthandler's
            last = tail.strip().rpartition("\n")[2][:300]
            summary, reason = {"last_line": last}, f"{reason}: {last}" if status == "failed" else reason
            if stage.file is not None and stage.file.exists() and stage.file.stat().st_mtime > wall:
                summary = _summary(stage.file)
                kept = stage.file.name if stage.name == "bench" else _kept(stage.file)  # the suite resumes it
            elif stage.file is not None:
                raise FileNotFoundError(f"{stage.file.name} was not written")
    except Exception as error:
        status = "failed" if status == "ok" else status
        reason = f"{reason}; {type(error).__name__}: {error}"[:600].removeprefix("; ")
    taken = {"seconds": round(time.monotonic() - start, 1), "limit_s": round(limit, 1)}
    return {"status": status, **taken, "reason": reason, "summary": summary, "json": kept, "tail": tail}


def _executed(stage: Stage, limit: float, log: IO[bytes]) -> tuple[str, str]:
    """Run a command, and end it and all that it started within its limit; returns status and reason."""
    grace, given = min(3.0, limit / 4), f"{max(limit - 15, limit / 2):.0f}s"
    command = [given if argument == BUDGET else argument for argument in stage.command]
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    env = {**os.environ, "PYTHONPATH": paths, "PYTHONFAULTHANDLER": "1"}
    process = Popen(command, stdin=DEVNULL, stdout=log, stderr=STDOUT, cwd=ROOT, env=env, start_new_session=True)
    try:
        code = process.wait(limit - grace)
        return ("failed", f"exit status {code}") if code else ("ok", "")
    except TimeoutExpired:
        process.send_signal(signal.SIGABRT)  # Python then prints where it hangs
        with suppress(TimeoutExpired):
            process.wait(grace)
        return "timed out", f"killed after {limit - grace:.0f} s"
    finally:
        with suppress(ProcessLookupError, TimeoutExpired):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(1.0)


def _summary(file: Path) -> dict[str, Any]:
    """How often a report has which status; failures by place, and what tests recorded of numbers."""
    found = list(_tests(file) if file.suffix == ".xml" else _statuses(json.loads(file.read_text())))
    failures = {place: told[:300] for place, status, told in found if status in ("failed", "False", "failure", "error")}
    summary = {"counts": Counter(status for _, status, _ in found), "failures": dict(list(failures.items())[:50])}
    return summary | ({"recorded": _recorded(file)} if file.suffix == ".xml" else {})


def _tests(file: Path) -> Iterator[tuple[str, str, str]]:
    for case in ElementTree.parse(file).iter("testcase"):
        outcomes = [inner for inner in case if inner.tag in ("failure", "error", "skipped")]
        told = [*outcomes, ElementTree.Element("passed")][0]
        yield f"{case.get('classname')}::{case.get('name')}", told.tag, told.get("message", "")


def _recorded(file: Path) -> dict[str, dict[str, str]]:
    """Tests' properties by test and name."""
    cases = ((case.get("name", ""), case.iter("property")) for case in ElementTree.parse(file).iter("testcase"))
    found = {name: {p.get("name", ""): p.get("value", "")[:2000] for p in properties} for name, properties in cases}
    return {name: values for name, values in found.items() if values}


def _statuses(value: Any, place: str = "") -> Iterator[tuple[str, str, str]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        yield from _statuses(one, f"{place}/{key}")
    if place and isinstance(value, dict) and isinstance(status := value.get("status", value.get("ok")), bool | str):
        told = [str(value[word]) for word in ("problem", "error", "reason", "detail") if value.get(word)]
        yield place, str(status), "; ".join(told)


def _kept(file: Path) -> str | None:
    """The name of a report, made small; None if it is not kept."""
    from fastcfg.utils.files import write_text

    if file.suffix == ".json" and file.stat().st_size > LARGEST:
        full = {"object_hook": lambda found: {key: one for key, one in found.items() if one not in (None, "", [])}}
        slim = json.loads(file.read_text(), parse_float=lambda digits: float(f"{float(digits):.4g}"), **full)
        write_text(file, json.dumps(slim, separators=(",", ":")) + "\n")
    return file.name if file.suffix == ".json" and file.stat().st_size <= LARGEST else file.unlink()


def seconds_of(text: str) -> float:
    """The type of a time such as 9m, 240s or 9m30s."""
    if not (match := re.fullmatch(r"(?:(\d+)m)?(?:(\d+)s)?", text)) or not any(map(int, match.groups("0"))):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a time such as 9m, 240s or 9m30s")
    return 60.0 * int(match[1] or 0) + int(match[2] or 0)


def probe() -> dict[str, Any] | None:
    """The environment, None without a GPU; asked of another process, so that this one does not use the GPU."""
    code = "import json, torch, benchmarks.environment as e; cuda = torch.cuda.is_available()"
    code += "; print(json.dumps(e.environment(torch.device('cuda'), None) if cuda else None))"
    told, _ = Popen([sys.executable, "-c", code], cwd=ROOT, stdout=PIPE).communicate(timeout=60)
    return json.loads(told or "null")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    begin, names = time.monotonic(), [stage.name for stage in all_stages(ROOT)]
    parser = argparse.ArgumentParser("python -m benchmarks gpu_session", description=__doc__)
    parser.add_argument("--out", metavar="FOLDER", help="for reports (default: benchmarks/results/NAME-OF-GPU)")
    parser.add_argument("--budget", metavar="TIME", type=seconds_of, default=570.0, help="in all (default: 9m30s)")
    parser.add_argument("--only", metavar="STAGE", nargs="+", choices=names, help=f"of {', '.join(names)}")
    parser.add_argument("--dry-run", action="store_true", help="print commands and limits, run nothing")
    arguments = parser.parse_args(argv)
    environment = {"device": "NAME OF GPU"} if arguments.dry_run else probe()
    if environment is None:
        parser.error("this needs a GPU, and torch sees none (--dry-run shows what would run)")
    slug = re.sub(r"[^a-z0-9]+", "-", environment["device"].lower()).strip("-")
    out = Path(arguments.out or ROOT / "benchmarks" / "results" / slug).resolve()
    stages = [stage for stage in all_stages(out) if stage.name in (arguments.only or names)]
    if arguments.dry_run:
        for stage, limit in zip(stages, limits(stages, arguments.budget), strict=True):
            print(f"{stage.name}: {stage.skip or f'{limit:.0f} s'}: {' '.join(stage.command)}")
        return 0
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))  # SIGABRT would dump
    counts = Counter(r["status"] for r in run(stages, out, arguments.budget, environment, begin)["stages"].values())
    print(", ".join(f"{n} {status}" for status, n in counts.items()), f"in {time.monotonic() - begin:.0f} s; {out}")
    return 1 if counts["failed"] or counts["timed out"] else 0
