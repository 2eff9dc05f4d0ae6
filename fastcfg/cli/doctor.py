"""`fastcfg doctor`: what is installed, what will run, and whether it works."""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import STDOUT, add_command, add_json
from .outputs import check_json, write_json
from .versions import versions

if TYPE_CHECKING:
    import torch

_DESCRIPTION = """\
Show what is installed, which backend runs here and why, whether CUDA graphs can be used, and the state of the GPU;
then check that one fused step gives the right numbers and that the package's model can be read.

Exit status: 0 if fastcfg can be used, else 1."""

_EXAMPLES = """\
examples:
  fastcfg doctor
  fastcfg doctor --json doctor.json"""

# benchmarks/results/cpu/bench.json, one thread: the times of the reference over those of the native step.
_WITHOUT_NATIVE = "without it, a step on this CPU takes 5 to 8 times as long"
# Measured between float32 and float64: 1.8e-7.
_STEP_TOLERANCE = 1e-5


def add_parser(commands: Any) -> None:
    """Add the command."""
    text = "show what runs here and whether it works"
    parser = add_command(commands, "doctor", run, help=text, description=_DESCRIPTION, epilog=_EXAMPLES)
    add_json(parser, "the findings")


def run(arguments: argparse.Namespace) -> int:
    """Examine, and print or write the findings."""
    check_json(arguments.json)
    findings = examine()
    write_json(arguments.json, findings)
    if arguments.json != STDOUT:
        _print(findings)
    return 0 if findings["usable"] else 1


def examine() -> dict[str, Any]:
    """All findings, as the command writes them."""
    import torch

    from fastcfg.ops import resolve_backend

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backend = resolve_backend("auto", device)
    checks = {"fused_step": _checked(lambda: _check_step(device, backend)), "checkpoint": _checked(_check_checkpoint)}
    driver, gpus = _gpus()  # after the step: NVML lists this process only once it uses the GPU
    cuda = device.type == "cuda"
    yes = "the step and the model are captured together where the model allows it"
    graphs = {"supported": cuda, "reason": yes if cuda else "CUDA graphs need a GPU; programs run eagerly"}
    usable = all(check["ok"] for check in checks.values())
    findings = {"usable": usable, "versions": versions(optional=True), "platform": platform.platform(), "cpu": _cpu()}
    findings |= {"gpus": gpus, "nvml": driver, "device": device.type}
    findings |= {"backend": {"auto": backend, "others": _others(backend, device)}, "graphs": graphs}
    return findings | {"checks": checks}


def _cpu() -> dict[str, Any]:
    import torch

    from fastcfg.reference._fma import addcmul_rounds_once

    cpu = {"name": cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    cpu["capability"] = torch.backends.cpu.get_cpu_capability()
    # Without it the reference goes through float64: correct but slower.
    return cpu | {"addcmul_rounds_once": addcmul_rounds_once(torch.device("cpu"))}


def cpu_name() -> str:
    """The CPU's name in /proc/cpuinfo, else its architecture."""
    lines = []
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _gpus() -> tuple[str, list[dict[str, Any]]]:
    """NVML's driver version, or why it is unknown; and properties and state of every GPU that torch sees."""
    import torch

    from .nvml import nvml_states

    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    driver, states = nvml_states([f"GPU-{gpu.uuid}" for gpu in found])
    gpus = []
    for gpu, state in zip(found, states or [{}] * len(found), strict=True):
        capability, memory = f"{gpu.major}.{gpu.minor}", gpu.total_memory / 2**30
        gpus.append({"name": gpu.name, "capability": capability, "memory_gib": memory} | state)
    return driver, gpus


def _others(chosen: str, device: torch.device) -> dict[str, str]:
    """By backend, why "auto" did not choose it."""
    from fastcfg.ops import inductor_problem, instruction_sets, native_problem, triton_problem

    native = native_problem(device) or f"works on request, with {instruction_sets()[-1]}"
    if device.type == "cpu" and not instruction_sets():
        native = f"{native}; {_WITHOUT_NATIVE}"
    reasons = {
        "triton": triton_problem(device) or "the interpreter runs kernels for tests only",
        "inductor": inductor_problem(device) or "works on request; it compiles for seconds",
        "native": native,
        "reference": "slower than the fused kernel",
    }
    return {name: reason for name, reason in reasons.items() if name != chosen}


def _checked(check: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A check's findings; an exception is a finding too."""
    try:
        return check()
    except Exception as error:
        return {"ok": False, "detail": f"{type(error).__name__}: {error}"}


def _check_step(device: torch.device, backend: str) -> dict[str, Any]:
    """One step of the backend against the reference in float32 and float64 on the CPU."""
    import torch

    cpu = torch.device("cpu")
    got = _one_step(device, backend, torch.float32)
    same = torch.equal(got, _one_step(cpu, "reference", torch.float32))
    error = float((got.double() - _one_step(cpu, "reference", torch.float64)).abs().max())
    bits = f"{'' if same else 'not '}bit for bit the reference"
    detail = f"{backend} on {device.type}, {error:.1e} from float64, {bits}"
    return {"ok": error < _STEP_TOLERANCE, "detail": detail, "max_error": error, "equals_reference": same}


def _one_step(device: torch.device, backend: str, dtype: torch.dtype) -> torch.Tensor:
    """A guided, clipped step with noise, on fixed numbers."""
    import torch

    from fastcfg import Schedule, solvers
    from fastcfg.ops import GuidedStep
    from fastcfg.step import StepBuffers, StepSpec

    table = solvers.ddim(Schedule.named("squaredcos_cap_v2").respace(10), eta=0.5)
    generator = torch.Generator().manual_seed(0)
    x, output = (torch.randn(n, 3, 8, 8, generator=generator).to(device, dtype) for n in (2, 4))
    position = torch.tensor([5, 0], dtype=torch.int32, device=device)
    weights = torch.tensor([3.0, 0.0], device=device, dtype=dtype).expand(len(table), 2, 2).contiguous()
    bound, seeds = torch.ones(2, device=device, dtype=dtype), torch.arange(2, device=device)
    buffers = StepBuffers(x, table.on(device, dtype), position, weights=weights, bound=bound, seeds=seeds)
    GuidedStep(StepSpec(branches=2, base=1, clip=True, noise_source="philox"), buffers, backend)(output)
    return buffers.x.cpu()


def _check_checkpoint() -> dict[str, Any]:
    from importlib.util import find_spec

    from fastcfg.pipelines.text_to_image import TextToImage

    # Sampling with a model of your own works without them.
    if missing := [name for name in ("safetensors", "tokenizers") if find_spec(name) is None]:
        return {"ok": True, "detail": f"not read: {' and '.join(missing)} not installed"}
    pipeline = TextToImage.load()
    meta, weights = pipeline.meta, sum(p.numel() for p in pipeline.model.parameters())
    size = f"{meta.image_size}x{meta.image_size}"
    return {"ok": True, "detail": f"{size}, {weights / 1e6:.1f} M weights, T = {meta.num_timesteps}, {meta.schedule}"}


def _print(findings: dict[str, Any]) -> None:
    cpu, backend, graphs = findings["cpu"], findings["backend"], findings["graphs"]
    known = [f"{name} {version}" for name, version in findings["versions"].items() if version]
    missing = [name for name, version in findings["versions"].items() if not version]
    lines = [
        ("versions", ", ".join(known)),
        *([("", f"not installed: {', '.join(missing)}")] if missing else []),
        ("platform", findings["platform"]),
        ("cpu", f"{cpu['name']}, {cpu['cores']} cores, {cpu['threads']} threads, {cpu['capability']}"),
        ("", "addcmul rounds once" if cpu["addcmul_rounds_once"] else "addcmul rounds twice: slower reference path"),
        *(line for gpu in findings["gpus"] or [{}] for line in _gpu_lines(gpu)),
        ("nvml", f"driver {findings['nvml']}" if findings["gpus"] else findings["nvml"]),
        ("backend", f"auto is {backend['auto']}"),
        *(("", f"not {name}: {reason}") for name, reason in backend["others"].items()),
        ("graphs", f"{'yes' if graphs['supported'] else 'no'}: {graphs['reason']}"),
        *((name, f"{'ok' if c['ok'] else 'FAILED'}: {c['detail']}") for name, c in findings["checks"].items()),
        ("usable", "yes" if findings["usable"] else "no"),
    ]
    for label, text in lines:
        print(f"{label:<12}{text}")


def _gpu_lines(gpu: dict[str, Any]) -> list[tuple[str, str]]:
    if not gpu:
        return [("gpu", "none that torch sees")]
    lines = [("gpu", f"{gpu['name']}, capability {gpu['capability']}, {gpu['memory_gib']:.0f} GiB")]
    if "power_limit_w" in gpu:
        shown = {name: f"{value:.0f}" if isinstance(value, int | float) else "?" for name, value in gpu.items()}
        lines += [("", "{power_w} of {power_limit_w} W, {temperature_c} C".format_map(shown))]
        lines += [("", "SM {sm_clock_mhz} of {sm_clock_max_mhz} MHz".format_map(shown))]
        lines += [("", "memory {memory_clock_mhz} of {memory_clock_max_mhz} MHz".format_map(shown))]
        lines += [("", f"clocks held down by: {', '.join(gpu['throttle_reasons'] or []) or 'nothing'}")]
    return lines
