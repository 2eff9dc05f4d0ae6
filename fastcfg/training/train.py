"""The training loop, common to all tasks."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..models.checkpoint import save_checkpoint
from ..schedule import Schedule
from ..utils.files import replacing, write_text
from ..utils.progress import progress_bar
from . import curve
from .config import TrainConfig
from .ema import EMA
from .folder.config import FolderConfig
from .folder.task import FolderTask
from .losses import HybridLoss
from .shapes.config import ShapesConfig
from .shapes.task import ShapesTask
from .state import load_state, save_state
from .task import Task, seed_for

RECIPE, STATE, CHECKPOINT, LOG, PLOT = "recipe.json", "state.pt", "model.safetensors", "log.jsonl", "loss_curve.png"
GLIDE = "glide.pt"

_NOISY = 0.15  # the last part of the diffusion, to which `noisy_share` moves pictures
_SAVING_SHARE = 0.05  # of a run's time, at most about: the state of a network of GLIDE's size is 6 GB


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """The result of a run.

    Attributes:
        steps, seconds: number of steps made, and the time they took, those before resuming included.
        loss: mean loss of the last tenth of the logged steps.
        checkpoint, glide: file of the averaged weights, and of the same for GLIDE's own code, or None, see `Task`.
    """

    steps: int
    seconds: float
    loss: float
    checkpoint: Path
    glide: Path | None = None


def make_task(config: TrainConfig, run: str | os.PathLike[str] | None = None) -> Task:
    """The task of a recipe, on the CPU; errors as `train`, and TypeError for a recipe of unknown kind.

    `run` is the folder of a run to resume: initial weights are not read, as its state has later ones.
    """
    if isinstance(config, ShapesConfig):
        return ShapesTask(config)
    if isinstance(config, FolderConfig):
        return FolderTask(config, None if run is None else Path(run) / CHECKPOINT)
    raise TypeError(f"config: got {type(config).__name__}, expected ShapesConfig or FolderConfig")


def train(
    config: TrainConfig,
    out_dir: str | os.PathLike[str],
    *,
    resume: bool = False,
    progress: bool = True,
    device: str = "cpu",
    save_seconds: float = 180.0,
    stop_after: int | None = None,
    tell: Callable[[str], None] | None = None,
) -> TrainResult:
    """Train by a recipe. Writes into `out_dir`: recipe, log, loss curve, state, and the averaged weights.

    State and weights are also written every `save_seconds`, or less often if writing is slow. A run resumed from its
    state gives the same result as an uninterrupted one: bit for bit on a CPU; GPU kernels may add in another order.

    Args:
        out_dir, resume: folder to write to, made if missing; continue from the state in it.
        progress: show a progress bar on stderr.
        stop_after: stop when this many steps have been made in all, as if interrupted.
        tell: called with a line about the data, before the first step.

    ValueError if the recipe does not fit network, weights, data or state, or `out_dir` contains a run and `resume` is
    False; OSError if the folder cannot be written to, or data or weights cannot be read.

    Example:
        >>> result = train(ShapesConfig(steps=100), "run", progress=False)
        >>> model, tokenizer, meta = load_checkpoint(result.checkpoint)
    """
    out = Path(out_dir)
    if resume and not (out / STATE).is_file():
        raise ValueError(f"resume: got {out / STATE}, which is not a file, expected a training state")
    if not resume and (out / STATE).exists():
        raise ValueError(f"out_dir: got {out}, which holds a run, expected resume or another folder")
    task = make_task(config, out if resume else None)
    with contextlib.closing(_Run(config, task, torch.device(device))) as run:
        step, seconds, log = 0, 0.0, []
        if resume:
            step, seconds = load_state(out / STATE, config, task.fingerprint, run.parts)
            log = curve.read_log(out / LOG)[:step]
        if tell and task.summary:
            tell(task.summary)
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / RECIPE, config.to_json())
        write_text(out / LOG, "".join(json.dumps(entry) + "\n" for entry in log))
        end = config.steps if stop_after is None else min(stop_after, config.steps)
        started, pause = time.monotonic(), save_seconds
        saved = started
        bar = progress_bar(progress, total=config.steps, initial=step, mininterval=1.0)
        with bar, open(out / LOG, "a", encoding="utf-8") as log_file:
            while step < end:
                entry = run.step(step)
                step += 1
                log.append(entry)
                log_file.write(json.dumps(entry) + "\n")
                bar.update(1)
                now = time.monotonic()
                if progress:
                    loss = np.mean([e["loss"] for e in log[-100:]])
                    rate = (bar.format_dict["rate"] or 0.0) * config.batch_size
                    bar.set_postfix(loss=f"{loss:.4f}", images_per_s=f"{rate:.3g}", refresh=False)
                if now - saved > pause and step < end:
                    log_file.flush()
                    run.save(out, step, seconds + now - started)
                    saved = time.monotonic()
                    pause = max(save_seconds, (saved - now) / _SAVING_SHARE)
        seconds += time.monotonic() - started
        run.save(out, step, seconds)
    curve.plot(log, out / PLOT)
    tail = log[-max(len(log) // 10, 1) :]
    glide = out / GLIDE if task.glide else None
    return TrainResult(step, seconds, float(np.mean([e["loss"] for e in tail])), out / CHECKPOINT, glide)


def draw_noise(num_timesteps: int, noisy_share: float, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Draw timesteps, int64 [B], and noise, float32 of `shape` [B, C, H, W]; always from torch's CPU generator."""
    t = torch.randint(num_timesteps, shape[:1])
    noise = torch.randn(shape)
    if noisy_share:
        latest = num_timesteps - torch.randint(math.ceil(_NOISY * num_timesteps), t.shape) - 1
        t = torch.where(torch.rand(t.shape) < noisy_share, latest, t)
    return t, noise


class _Run:
    """Task, average and optimizer of one run."""

    def __init__(self, config: TrainConfig, task: Task, device: torch.device) -> None:
        self.config, self.task, self.device = config, task, device
        self.model = task.model.to(device)
        if config.channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.heads = task.heads.to(device)
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.ema = EMA(self.model, config.ema_decay)
        trained, betas = [*self.parameters, *self.heads.parameters()], (0.9, config.beta2)
        self.optimizer = torch.optim.AdamW(trained, config.learning_rate, betas, weight_decay=config.weight_decay)
        self.parts = {name: getattr(self, name) for name in ("model", "heads", "ema", "optimizer")}
        self.num_timesteps = task.meta.num_timesteps
        self.loss = HybridLoss(Schedule.named(task.meta.schedule, self.num_timesteps), config.mse_weight_cap)
        threads = max(torch.get_num_threads() // config.shards, 1)
        self.pool = ThreadPoolExecutor(config.shards, initializer=torch.set_num_threads, initargs=(threads,))

    def step(self, step: int) -> dict[str, float]:
        """Make one optimizer step; returns the log entry."""
        config = self.config.at(step)
        changed = set(self.task.before(step))  # parameters set to new values: their average and optimizer state restart
        self.ema.reset((name, parameter) for name, parameter in self.model.named_parameters() if parameter in changed)
        for parameter in changed:
            self.optimizer.state.pop(parameter, None)
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate_at(step)
        batch = self.task.batch(step)
        trained = [*self.parameters, *self.task.trained_heads(config)]
        cuda = [self.device] if self.device.type == "cuda" else []
        terms: list[dict[str, Tensor]] = []
        self.optimizer.zero_grad(set_to_none=True)
        with torch.random.fork_rng(devices=cuda):
            torch.manual_seed(seed_for(self.config.seed, "step", step))
            t, noise = draw_noise(self.num_timesteps, config.noisy_share, batch["images"].shape)
            for part in _split({**batch, "t": t, "noise": noise}, config.accumulate):
                shards = _split({name: rows.to(self.device) for name, rows in part.items()}, config.shards)
                results = list(self.pool.map(self._shard, shards, itertools.repeat(trained), itertools.repeat(config)))
                terms += [losses for losses, _ in results]
                for parameter, *gradients in zip(trained, *(grads for _, grads in results), strict=True):
                    gradient = torch.stack(gradients).sum(dim=0) if len(gradients) > 1 else gradients[0]
                    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        norm = nn.utils.clip_grad_norm_(trained, self.config.grad_clip)
        self.optimizer.step()
        self.ema.update(self.model)
        values = {**{name: torch.stack([part[name] for part in terms]).sum() for name in terms[0]}, "grad_norm": norm}
        return {"step": step + 1, **{name: float(f"{value.item():.5g}") for name, value in values.items()}}

    def _shard(
        self, shard: dict[str, Tensor], trained: list[nn.Parameter], config: TrainConfig
    ) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        """A shard's share of the batch's mean losses, their weighted sum first, and the gradient of that sum."""
        x_start, t, noise = shard["images"], shard["t"], shard["noise"]
        x_t = self.loss.q_sample(x_start, t, noise)
        if config.channels_last:
            x_t = x_t.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.bf16):
            text = self.model.get_text_emb(shard["tokens"], shard["mask"])
            output = self.model(x_t, t, **text, **self.task.conditioning(shard)).float()
        terms = self.loss(output, x_start, x_t, t, noise)
        sums = {"loss": terms.loss.sum(), "mse": terms.mse.sum(), "vlb": terms.vlb.sum()}
        for name, (weight, other) in self.task.losses(shard, text, config).items():
            sums[name] = other
            if weight:
                sums["loss"] = sums["loss"] + weight * other
        parts = {name: value / config.batch_size for name, value in sums.items()}
        gradients = torch.autograd.grad(parts["loss"], trained)
        return {name: part.detach() for name, part in parts.items()}, gradients

    def save(self, out: Path, step: int, seconds: float) -> None:
        """Write the averaged weights, then the state: wherever there is a state there are weights."""
        averaged = self.task.empty_model()
        averaged.load_state_dict({name: value.cpu() for name, value in self.ema.shadow.items()}, assign=True)
        recipe = {**dataclasses.asdict(self.config), "steps_made": step}
        save_checkpoint(out / CHECKPOINT, averaged, dataclasses.replace(self.task.meta, recipe=recipe))
        if self.task.glide:
            with replacing(out / GLIDE) as temporary:
                torch.save(dict(averaged.state_dict()), temporary)
        save_state(out / STATE, self.config, self.task.fingerprint, step, seconds, self.parts)

    def close(self) -> None:
        """End the threads."""
        self.task.close()
        self.pool.shutdown(cancel_futures=True)


def _split(tensors: dict[str, Tensor], parts: int) -> list[dict[str, Tensor]]:
    """At most `parts` parts of the rows of all tensors."""
    chunks = zip(*(tensor.chunk(parts) for tensor in tensors.values()), strict=True)
    return [dict(zip(tensors, chunk, strict=True)) for chunk in chunks]
