"""Every kernel on tiny odd shapes, for a memory checker; on a CPU the reference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from fastcfg import DynamicThreshold, ops
from fastcfg.combination import Combination
from fastcfg.state_change import KNOWN_COLUMNS, RENOISE_STREAM, TENSOR, KnownBuffers, StateSpec
from fastcfg.step import StepBuffers, StepSpec
from fastcfg.table import COLUMNS, DEVICE_COLUMNS

CASES = {(1, 1, 1): torch.float32, (3, 3, 5, 7): torch.bfloat16, (2, 4, 1021): torch.float16}
_CFG = StepSpec(branches=2, base=1, noise_source="philox", clip=True)
_ALL = StepSpec(3, None, 0, 2, learned_variance=True, raw_output=True, gradient=True, history=3, noise_source="tensor")
_LOOKING = replace(_CFG, rescale=True, scaled=True, momentum=True)
SPECS = (StepSpec(), replace(_CFG, learned_variance=True), _LOOKING, replace(_ALL, keep_x0=True))


def calls(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, partial[object]]]:
    """Calls of all public operations, by name, for a state [B, C, ...] and a model's dtype; no tensor is a view."""
    normal, (n, channels), layout = partial(torch.randn, device=device), shape[:2], torch.contiguous_format
    layout = torch.channels_last if len(shape) == 4 else layout
    x, m, p, seeds = normal(shape), normal(shape).to(dtype), normal(n), torch.arange(n, device=device)
    wide = normal(3 * n, 2 * channels, *shape[2:]).to(dtype, memory_format=layout)
    yield "initial_noise", partial(ops.initial_noise, x.clone(), seeds)
    nodes, factors = torch.arange(5, device=device), normal(5)
    yield "brownian_noise", partial(ops.brownian_noise, x.clone(), seeds, nodes, factors, 5)
    yield "split_model_output", partial(ops.split_model_output, wide, channels)
    yield "guidance_blend", partial(ops.guidance_blend, wide, normal(n, 3), base=1)
    yield "gram", partial(ops.gram, wide, 3, 2, channels=channels, momentum=normal(shape), decay=0.5, conditional=0)
    yield "predict_x0", partial(ops.predict_x0, x, m, p, p, p.abs())
    yield "posterior_mean_variance", partial(ops.posterior_mean_variance, x, x, p, p, p, p, m)
    yield "quantile_bound", partial(ops.quantile_bound, x, 0.9)
    yield "dynamic_threshold", partial(ops.dynamic_threshold, x, 0.9)
    yield (
        "Combine",
        partial(
            ops.Combine(Combination(np.ones((2, 3)), np.ones(3), np.ones(2), 1.0), device), [x, m, x], [dtype, x.dtype]
        ),
    )
    for spec in SPECS:
        output, table = wide[: spec.branches * n].clone(), normal(3, len(DEVICE_COLUMNS))
        table[:, COLUMNS.index("slot")] = spec.history - 1.0
        history, counter = normal(spec.history + 1, *shape), torch.zeros(2, dtype=torch.int32, device=device)
        weights, images = normal(2, n, spec.branches + spec.momentum), [normal(shape) for _ in range(3)]
        given = (weights, p.abs(), normal(shape), seeds, history, *images)
        following = output[:, :channels].clone(memory_format=layout), normal(len(output))
        buffers = StepBuffers(x.clone(), table, counter, *given, *following)
        if spec.noise_source != "none":
            sums = ops.sums_memory(len(table) - 1, x, "triton" if device.type == "cuda" else "reference")
            yield "NoiseSums", partial(ops.NoiseSums(spec, buffers, sums), output)
        if spec.rescale:
            yield "QuantileBound", partial(ops.QuantileBound(DynamicThreshold(0.9), spec, buffers), output)
        yield f"GuidedStep {spec}", partial(ops.GuidedStep(spec, buffers), output)
        if spec.history:
            sources, record = torch.arange(spec.branches + 1, device=device).int(), torch.zeros(1, device=device).long()
            yield "FiniteCheck", partial(ops.FiniteCheck(buffers.x, counter, sources, record, 1), output)
            known = KnownBuffers(normal(shape), normal(shape), normal(2, len(KNOWN_COLUMNS)), normal(shape))
            change = StateSpec(known=True, noise=TENSOR, renoise=RENOISE_STREAM)
            yield "StateChange", partial(ops.StateChange(change, buffers, known), buffers.x)


def main() -> None:
    """Make the calls, a line for each."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for shape, dtype in CASES.items():
        for name, call in calls(shape, dtype, device):
            print(f"{name} {list(shape)} {dtype} on {device.type}", flush=True)
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()


if __name__ == "__main__":
    main()
