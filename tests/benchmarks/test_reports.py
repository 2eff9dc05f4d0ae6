"""Reports of the benchmarks as tables, pictures, comparisons and README blocks."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.__main__ import main
from benchmarks.report import plots, readme
from benchmarks.report.reading import OURS, duration, load, spread
from benchmarks.report.tables import markdown, terminal
from fastcfg.cli.parser import UsageError

pytestmark = pytest.mark.quick

Report = dict[str, Any]
STEP = "step/ddpm/pixel-64/b16/float32/given"
SHAPES = {"pixel-64": ((1, 3, 64, 64), (16, 3, 64, 64)), "latent-128": ((1, 4, 128, 128),)}


def around(value: float) -> dict[str, float]:
    return {"p20": 0.9 * value, "p50": value, "p80": 1.1 * value}


def result(kind: str, solver: str, family: str, shape: tuple[int, ...], noise: str, times: dict[str, float]) -> Report:
    """A result with these times of a row in microseconds."""
    floors = ("copy of the same bytes", "smallest kernel", "model alone")
    rows = 50 if kind == "loop" else 1
    providers: dict[str, Any] = {
        name: {
            "status": "ok",
            "reason": "",
            "us": around(time * rows),
            "gb_per_s": 800 / time if kind == "step" else None,
            "of_copy": 0.83 if name == "triton" else None,
            "counts": {"dispatched": 9 * rows, "kernels": 7 * rows, "full_size": 3, "reads": 0, "host_copies": None},
            "error": 3.4e-7,
            **({"floor": True} if name in floors else {}),
        }
        for name, time in times.items()
    }
    ratios = {
        own: {base: around(times[base] / times[own]) for base in times if base not in (*OURS, *floors)}
        for own in times
        if own in OURS
    }
    found = {"kind": kind, "solver": solver, "family": family, "shape": list(shape), "dtype": "float32", "noise": noise}
    clock = {"rows": rows, "bytes": 4_000_000 if kind == "step" else None, "clock": "cpu", "turns": 20}
    return {**found, **clock, "providers": providers, "ratios": ratios}


@pytest.fixture
def report() -> Report:
    """Steps of two solvers and three shapes, and a loop, on a CPU."""
    results = {}
    for solver in ("ddpm", "ddim"):
        for family, shapes in SHAPES.items():
            for shape in shapes:
                for noise in ("given", "drawn"):
                    size = 2 + shape[0]
                    times = {"guided-diffusion": 500, "GLIDE": 600, "reference": 200, "inductor": 100}
                    floor = {"copy of the same bytes": 20}
                    found = result(
                        "step", solver, family, shape, noise, {k: v * size for k, v in (times | floor).items()}
                    )
                    found["providers"]["triton"] = {"status": "absent", "reason": "needs a GPU"}
                    found["providers"]["torch.compile"] = {"status": "absent", "reason": "needs a GPU"}
                    results[f"step/{solver}/{family}/b{shape[0]}/float32/{noise}"] = found
    results[STEP]["providers"]["diffusers"] = {"status": "refused", "reason": "1e-03 is too far", "error": 1e-3}
    loop = {"guided-diffusion": 3000, "fastcfg": 2000, "fastcfg captured compiled": 900, "model alone": 1000}
    results["loop/ddim/embedded/b1/float32"] = result("loop", "ddim", "embedded", (1, 3, 32, 32), "given", loop)
    gpus = {"H100 SXM": {"bytes_ps": 5.37, "instructions_ps": 2.1, "bound": "bytes"}}
    row = {"variant": "main", "target": "sm_90", "bytes_per_element": 18, "instructions_per_element": 69.62}
    rows = [row | {"registers": 93, "spills": 0, "stack_bytes": 0, "gpus": gpus}]
    facts = {"torch": "2.13.0", "device": "AMD EPYC", "device_type": "cpu", "threads": 1, "commit": "abc123"}
    return {
        "schema": 1,
        "finished": True,
        "environment": facts,
        "settings": {"seconds": 1.0},
        "gpu": None,
        "results": results,
        "left": {"loop/ddim/sdxl": "needs a GPU", "loop/ddim/sd15": "needs a GPU", "step/late": "time budget used up"},
        "roofline": {"triton": "3.9.0", "rows": rows},
    }


def on_gpu(report: Report) -> Report:
    report["environment"] |= {"device": "H100", "device_type": "cuda"}
    times = {"guided-diffusion itself": 20.0, "torch.compile max-autotune": 8.0, "triton": 4.0}
    shape = (64, 3, 64, 64)
    report["results"][STEP] = result(
        "step", "ddpm", "latent-128", shape, "given", times | {"copy of the same bytes": 3}
    )
    report["results"][STEP]["providers"]["triton"] |= {"of_roofline": 0.5, "device_us": around(2.5)}
    report["results"][STEP]["ratios"]["triton"]["torch.compile max-autotune"] = around(99.94)
    report["gpu"] = {"notes": ["clocks fell to 1755 MHz"]}
    report["finished"] = False
    return report


def test_the_terminal_shows_the_fastest_of_either_side(report: Report) -> None:
    lines = terminal(report).splitlines()
    assert lines[0] == "AMD EPYC, 1 thread"
    assert lines[2] == "how many times as long as fastcfg's fastest provider:"
    assert lines[3].split() == ["step", "guided-diffusion", "5", "to", "5,", "GLIDE", "6", "to", "6"]
    assert lines[4].split() == ["loop", "guided-diffusion", "3.3", "to", "3.3"]
    start = next(i for i, line in enumerate(lines) if line.startswith("step ddpm, noise given"))
    row = "pixel-64 b16  f32 guided-diffusion 9 ms inductor 1.8 ms 5.0 (4.5-5.5) 0 7"
    assert lines[start + 3].split() == row.split()
    loop = "embedded b1 f32 guided-diffusion 3 ms fastcfg captured compiled 900 µs 3.3 (3.0-3.7) 7"
    assert loop.split() in [line.split() for line in lines]
    assert "copy of" not in "\n".join(lines)


def test_the_terminal_shows_a_gpus_columns_in_its_width(report: Report) -> None:
    told = terminal(on_gpu(report))
    row = "latent-128 b64 f32 compile max-autotune 8 µs triton 4 µs 99.9 (89.9-109.9) 200 83% 50% 7"
    assert row.split() in [line.split() for line in told.splitlines()]
    assert max(map(len, told.splitlines())) <= 120
    assert "GPU: clocks fell to 1755 MHz\nnot finished\n" in told


def test_reasons_are_reported_once(report: Report) -> None:
    told = " ".join(terminal(report).split())
    assert "absent, needs a GPU: triton, torch.compile (in step/ddpm/pixel-64/b1/float32/given, " in told
    assert "and 9 more)" in told
    assert f"refused, 1e-03 is too far: diffusers (in {STEP})" in told
    assert (
        "left undone, needs a GPU: loop/ddim/sdxl, loop/ddim/sd15 left undone, time budget used up: step/late" in told
    )
    assert told.count("needs a GPU") == 2
    assert "not finished" not in told


def test_markdown_has_every_provider(report: Report) -> None:
    told = markdown(report)
    heads = "| shape | dtype | provider | a run | / reference | / inductor | GB/s | error |"
    assert heads in told
    assert "| pixel-64 b16 | float32 | GLIDE | 10.8 ms | 3.0 (2.7-3.3) | 6.0 (5.4-6.6) | 0.1 | 3.4e-07 |" in told
    assert "| pixel-64 b16 | float32 | diffusers | refused |  |  |  | 1.0e-03 |" in told
    assert "| step ddim, noise drawn | pixel-64 | float32 | reference | 9 | 7 | 3 | 0 |" in told
    assert "| main | sm_90 | 18 | 69.6 | 93 | 0 | H100 SXM 5.4 (bytes) |" in told
    assert "| commit | abc123 |" in told
    assert "| latent-128 b64 | float32 | triton | 4 µs |" in (gpu := markdown(on_gpu(report)))
    assert "| 2.5 µs | 200.0 | 83% | 50% |" in gpu


def test_numbers_are_short() -> None:
    assert [duration(us) for us in (0.5, 999.4, 999.6, 1.5e6)] == ["0.5 µs", "999 µs", "1 ms", "1.5 s"]
    assert (spread(around(1.5)), spread(around(15)), spread(None)) == ("1.50 (1.35-1.65)", "15.0 (13.5-16.5)", "")


def compare(folder: Path, old: Report, new: Report) -> int:
    for name, report in (("old", old), ("new", new)):
        (folder / f"{name}.json").write_text(json.dumps(report))
    return main(["compare", str(folder / "old.json"), str(folder / "new.json")])


def test_a_report_equals_itself(report: Report, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(tmp_path, report, report) == 0
    told = capsys.readouterr().out
    assert told.endswith("\n50 ratios compared: 0 slower, 0 faster\n")
    assert "  reference: 1.00 (1.00-1.00), 12 results\n" in told
    assert "only in" not in told


@pytest.mark.parametrize(
    ("factor", "status", "title"),
    [(0.5, 1, "slower"), (2.0, 0, "faster"), (0.87, 0, "0 slower"), (1.15, 0, "0 faster")],
)
def test_changes_beyond_the_spread_are_reported(
    factor: float, status: int, title: str, report: Report, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = copy.deepcopy(report)
    ratio = new["results"][STEP]["ratios"]["reference"]["guided-diffusion"]
    ratio |= {key: value * factor for key, value in ratio.items()}
    assert compare(tmp_path, report, new) == status
    told = capsys.readouterr().out
    assert title in told
    if title in ("slower", "faster"):
        assert told.count(" -> ") == 1
        assert f"{title}:\n  {STEP}: guided-diffusion / reference: 2.5 (2.2-2.8) -> " in told


@pytest.mark.parametrize(
    ("provider", "found", "line"),
    [
        ("inductor", None, "inductor: missing"),
        ("GLIDE", {"status": "refused", "reason": "wrong"}, "GLIDE: refused wrong"),
        ("triton", {"status": "failed", "reason": "out of memory"}, "triton: failed out of memory"),
    ],
)
def test_who_is_gone_or_fails_is_reported(
    provider: str, found: Any, line: str, report: Report, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = copy.deepcopy(report)
    providers, ratios = new["results"][STEP]["providers"], new["results"][STEP]["ratios"]
    providers[provider] = found
    if not found:
        del providers[provider], ratios[provider]
    for bases in ratios.values():
        bases.pop(provider, None)
    assert compare(tmp_path, report, new) == 1
    assert f"gone, refused or failed:\n  {STEP}: {line}\n" in (told := capsys.readouterr().out)
    assert told.count(provider) <= 2  # here, and among the absolute times
    assert compare(tmp_path, new, report) == 0


def test_results_and_ratios_that_are_gone_are_reported(
    report: Report, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = copy.deepcopy(report)
    del new["results"][STEP]
    new["left"][STEP] = "time budget used up"
    assert compare(tmp_path, report, new) == 1
    assert f"{STEP}: time budget used up" in capsys.readouterr().out
    assert compare(tmp_path, new, report) == 0
    assert f"only in the new report:\n  {STEP}\n" in capsys.readouterr().out
    new = copy.deepcopy(report)
    del new["results"][STEP]["ratios"]["reference"]["GLIDE"]
    assert compare(tmp_path, report, new) == 1
    assert f"{STEP}: GLIDE / reference: 3.0 (2.7-3.3) -> no ratio" in capsys.readouterr().out


def test_absolute_times_are_reported_on_the_same_device_only(
    report: Report, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = copy.deepcopy(report)
    for found in new["results"].values():
        found["providers"]["guided-diffusion"]["us"]["p50"] *= 3
    assert compare(tmp_path, report, new) == 0
    assert "  guided-diffusion: 3.00 (3.00-3.00), 13 results\n" in capsys.readouterr().out
    new["environment"]["threads"] = 2
    new["results"][STEP]["clock"] = "wall"
    assert compare(tmp_path, report, new) == 0
    told = capsys.readouterr().out
    assert "compared:\n  threads: 1 -> 2\n  clock: ['cpu'] -> ['cpu', 'wall']\n50 ratios" in told


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"results": {"a": {}}}',
        '{"results": 3}',
        '{"results": {}}',
        '{"results": {}, "environment": {"device": ""}}',
        '{"results": {}, "environment": {}, "left": {}, "finished": true, "schema": 2}',
    ],
)
def test_what_is_no_report_is_an_error(
    text: str, report: Report, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(json.dumps(report))
    new.write_text(text)
    assert load(old) == report
    assert main(["compare", str(old), str(new)]) == 2
    assert re.search("new.json: (not a report of|got schema 2)", capsys.readouterr().err)
    assert main(["compare", str(old), str(tmp_path / "absent.json")]) == 2
    assert "absent.json: No such file" in capsys.readouterr().err


def test_pictures_show_the_report(report: Report) -> None:
    pytest.importorskip("matplotlib")
    figure = plots.speedup(report)
    # The latents, of one batch, make no line by batch.
    panels = ["pixel-64, ddpm", "pixel-64, ddim"]
    assert [axes.get_title() for axes in figure.axes] == panels
    assert "AMD EPYC, 1 thread, float32, noise given" in figure.get_suptitle()
    bars = figure.axes[0].containers[1]
    assert bars.get_label() == "GLIDE"
    assert list(bars.lines[0].get_ydata()) == [6, 6]
    assert bars.lines[0].get_xdata()[0] == pytest.approx(1.05**0.5)
    assert figure.axes[0].get_ylim() == figure.axes[1].get_ylim()
    ends = [end for bar in bars.lines[2][0].get_segments() for _, end in bar]
    assert ends == pytest.approx([5.4, 6.6, 5.4, 6.6])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["guided-diffusion", "GLIDE"]
    lines = {line.get_label(): line for line in plots.bandwidth(report).axes[0].lines}
    assert lines.keys() == {"guided-diffusion", "GLIDE", "reference", "inductor", "copy of the same bytes"}
    assert lines["copy of the same bytes"].get_linestyle() == "--"
    assert lines["inductor"].get_xydata().tolist() == [[4, pytest.approx(r)] for r in (8 / 18, 8 / 3, 8 / 3)]
    bars = plots.waterfall(report).axes[0].patches
    assert [bar.get_width() for bar in bars] == [900, 0, 1000, 1000, 1000, 2000]
    bounds = {line.get_label(): line.get_xdata().tolist() for line in plots.roofline(report).axes[0].lines}
    assert bounds == {"by bytes moved": [5.37], "by instructions issued": [2.1]}


def test_pictures_are_written_whole_or_not_at_all(
    report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    empty = report | {"results": {}, "roofline": None}
    assert plots.draw(empty, tmp_path) == []
    written = plots.draw(report, tmp_path)
    assert [path.name for path in written] == ["speedup.png", "bandwidth.png", "waterfall.png", "roofline.png"]
    assert sorted(written) == sorted(tmp_path.iterdir())
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)
    for path in written:
        path.unlink()

    def fail(figure: Any, path: Path, **options: Any) -> None:
        path.write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        plots.draw(report, tmp_path)
    assert not list(tmp_path.iterdir())


def test_nothing_to_show_is_not_drawn(report: Report) -> None:
    pytest.importorskip("matplotlib")
    for found in report["results"].values():
        found["ratios"] = {}
        for provider in found["providers"].values():
            provider.pop("gb_per_s", None)
    assert plots.speedup(report) is None
    assert plots.bandwidth(report) is None
    assert plots.waterfall(report) is not None


@pytest.fixture
def checkout(report: Report, tmp_path: Path) -> Path:
    """A README with all blocks, and what they are made from."""
    results = tmp_path / "benchmarks" / "results" / "cpu"
    results.mkdir(parents=True)
    (results / "bench.json").write_text(json.dumps(report))
    part = {"fraction": 0.977, "standard_error": 0.007}
    parts = dict.fromkeys(("correct", "colours", "shapes", "relation"), part)
    scales = [{"scale": 1.0, "own_prompts": parts, "shuffled_prompts": parts}]
    settings = {"num_prompts": 512, "solver": "ddpm", "steps": 50}
    (results / "adherence.json").write_text(json.dumps({"settings": settings, "scales": scales, "rendered": parts}))
    way = {"steps": 50, "scale": 3.0, "guidance": "cfg", "interval": [0.0, 1.0], "schedule": None}
    way |= {"num_prompts": 512, "adherence": 0.99, "standard_error": 0.004}
    best, fast, few = ({**way, "solver": name, "forwards_per_picture": 9.0} for name in ("ddpm", "heun", "euler"))
    few["num_prompts"] = 64
    demo = {"best_s": 20.0, "fast_s": 4.0, "ratio": [4.5, 5.0, 5.5], "threads": 2}
    told = {"best": best, "fast": fast, "demo": demo, "environment": {"device": "AMD EPYC"}, "ways": [few, fast]}
    (results / "forwards.json").write_text(json.dumps(told))
    names = ("steps", "roofline", "adherence", "forwards", "gpu")
    blocks = (f"<!-- results:{name} -->\nold\n\n<!-- end -->\n" for name in names)
    (tmp_path / "README.md").write_text("before\n" + "between\n".join(blocks) + "after\n")
    return tmp_path


def test_the_readme_is_made_from_the_results(report: Report, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(readme, "draw", lambda *arguments: drawn.append(arguments))
    assert readme.main(["--check"], checkout) == 1
    assert drawn == []
    assert readme.main([], checkout) == 0
    text = (checkout / "README.md").read_text()
    assert (
        "| pixel-64 b16 | ddpm | inductor 1.8 ms, inductor 1.8 ms | 3.6 ms, 3.6 ms | 5.0×, 5.0× | 6.0×, 6.0× |" in text
    )
    rows = [line.split(" | ")[:2] for line in text.splitlines() if "inductor" in line]
    assert rows == [[f"| {shape}", solver] for shape in readme.SHAPES for solver in ("ddpm", "ddim")]
    assert "within 11% of them" in text
    assert len(text.split("results:steps -->\n")[1].split("\n<!-- end")[0].splitlines()) == 4 + 6
    assert "| main | sm_90 | 18 | 69.6 | 93 | 0 |" in text
    assert "512 prompts, ddpm, 50 steps" in text
    assert "| 1 | 97.7 ± 0.7 |" in text
    assert "takes 20 s with best and 4 s with fast (AMD EPYC, 2 threads; 5.0×)" in text
    assert "| heun 50, cfg 3, `--quality fast` | 9.0 | 99.0 ± 0.4 |\n| ddpm 50, cfg 3, `--quality best` |" in text
    assert "euler" not in text.split("results:forwards")[1].split("<!-- end")[0]
    assert "No GPU result set exists yet" in text
    assert "old" not in text
    assert text.startswith("before\n<!-- results:steps -->\nAMD EPYC")
    assert text.endswith("<!-- end -->\nafter\n")
    assert drawn == [(report, checkout / "docs" / "cpu")]
    assert drawn[0][1].is_dir()


def test_the_check_notices_an_edited_number(checkout: Path) -> None:
    text = (checkout / "README.md").read_text()
    right = readme.generated(text, checkout / "benchmarks" / "results")
    (checkout / "README.md").write_text(right)
    assert readme.main(["--check"], checkout) == 0
    for number, other in (("5.0×", "5.1×"), ("69.6", "59.6"), ("97.7", "98.7")):
        assert number in right
        (checkout / "README.md").write_text(right.replace(number, other, 1))
        assert readme.main(["--check"], checkout) == 1
    assert (checkout / "README.md").read_text() != right


def test_steps_with_one_kind_of_noise_are_left_out(report: Report) -> None:
    del report["results"][STEP.replace("given", "drawn")]
    assert "| pixel-64 b16 | ddim |" in readme.steps(report)
    assert "| pixel-64 b16 | ddpm |" not in readme.steps(report)


def test_a_gpus_results_get_a_table(report: Report, checkout: Path) -> None:
    folder = checkout / "benchmarks" / "results" / "h100"
    folder.mkdir()
    report["environment"] |= {"device": "H100", "device_type": "cuda"}
    (folder / "bench.json").write_text(json.dumps(report))
    text = readme.generated((checkout / "README.md").read_text(), folder.parent)
    assert "<!-- results:gpu -->\nH100, float32" in text
    assert "No GPU" not in text


@pytest.mark.parametrize(
    "text",
    [
        "no blocks\n",
        "<!-- results:prices -->\n<!-- end -->\n",
        "<!-- results:steps -->\nnever closed\n<!-- results:gpu -->\n<!-- end -->\n",
    ],
)
def test_broken_blocks_are_errors(text: str, checkout: Path) -> None:
    (checkout / "README.md").write_text(text)
    with pytest.raises(UsageError, match="expected"):
        readme.main([], checkout)
    assert (checkout / "README.md").read_text() == text


def test_missing_results_are_errors(checkout: Path) -> None:
    for name in ("forwards.json", "adherence.json", "bench.json"):
        (checkout / "benchmarks" / "results" / "cpu" / name).unlink()
        with pytest.raises((UsageError, OSError), match=rf"{name}.*No such file|No such file.*{name}"):
            readme.main(["--check"], checkout)


def test_blocks_may_stand_in_either_file(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readme, "draw", lambda *arguments: None)
    text, other = (checkout / "README.md").read_text(), checkout / "docs" / "results.md"
    other.parent.mkdir()
    for first, second in (("no blocks\n", text), (text, "no blocks\n")):
        (checkout / "README.md").write_text(first)
        other.write_text(second)
        assert readme.main(["--check"], checkout) == 1
        assert readme.main([], checkout) == 0
        assert readme.main(["--check"], checkout) == 0
        found = [path for path in (checkout / "README.md", other) if "512 prompts" in path.read_text()]
        assert found == [other if second == text else checkout / "README.md"]


def test_few_turns_are_not_judged(report: Report, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = copy.deepcopy(report)
    ratios = new["results"][STEP]["ratios"]["reference"]
    ratios |= {base: around(0.1 * ratio["p50"]) for base, ratio in ratios.items()}
    assert compare(tmp_path, report, new) == 1
    report["results"][STEP]["turns"] = 7
    capsys.readouterr()
    assert compare(tmp_path, report, new) == 0
    assert "not judged: too few turns:" in capsys.readouterr().out


def test_the_readme_is_what_the_committed_results_make_of_it() -> None:
    assert readme.main(["--check"]) == 0
    lines = (readme.ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) < 200
