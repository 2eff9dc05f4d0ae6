"""The training loop: one for every task."""

from __future__ import annotations

import argparse
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
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastcfg.models.checkpoint import save_checkpoint
from fastcfg.schedule import Schedule
from fastcfg.training import curve
from fastcfg.training.config import TrainConfig
from fastcfg.training.ema import EMA
from fastcfg.training.folder.config import FolderConfig
from fastcfg.training.folder.task import FolderTask
from fastcfg.training.losses import HybridLoss
from fastcfg.training.recipes import read_recipe
from fastcfg.training.shapes.config import ShapesConfig
from fastcfg.training.shapes.task import ShapesTask
from fastcfg.training.state import load_state, save_state
from fastcfg.training.task import Task, seed_for
from fastcfg.utils.files import replacing, write_text

RECIPE, STATE, CHECKPOINT, LOG, PLOT = "recipe.json", "state.pt", "model.safetensors", "log.jsonl", "loss_curve.png"
GLIDE = "glide.pt"

# The part of the diffusion that `noisy_share` adds to.
_NOISY = 0.15

# Writing takes at most about this share of a run: the state of a network of GLIDE's size is 6 GB.
_SAVING_SHARE = 0.05


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a run left behind.

    Attributes:
        steps: steps made in all, resumed ones included.
        seconds: time they took.
        loss: mean loss of the last tenth of the logged steps.
        checkpoint: the averaged weights.
        glide: the same as a state dict that GLIDE's own code loads, or None, see ``Task``.
    """

    steps: int
    seconds: float
    loss: float
    checkpoint: Path
    glide: Path | None = None


def make_task(config: TrainConfig, run: str | os.PathLike[str] | None = None) -> Task:
    """The task of a recipe.

    Args:
        config: the recipe.
        run: folder of the run that is resumed: initial weights are then not read, as the state has later ones.

    Returns:
        The task, on the CPU.

    Raises:
        ValueError: the recipe does not fit its network, weights or data.
        TypeError: a recipe of no known kind.
        OSError: a file cannot be read.
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
    """Train by a recipe. Writes into ``out_dir``: recipe, log, loss curve, state, and the averaged weights.

    State and weights are also written every ``save_seconds``, or more rarely where that takes long, so an interrupted
    run loses little: ``resume=True`` goes on from the state, and the result is the same as without the interruption:
    bit for bit on a CPU, while kernels of a GPU may add in another order each time.

    Args:
        config: the recipe.
        out_dir: folder to write to, made if missing.
        resume: go on from the state in ``out_dir``.
        progress: show a progress bar on stderr.
        device: where to train.
        save_seconds: time between writes.
        stop_after: stop once this many steps are made in all, as an interruption would.
        tell: called with a line about the data, before the first step.

    Returns:
        The result.

    Raises:
        ValueError: a recipe that does not fit the network, the data or the state; a folder that holds a run, without
            ``resume``.
        OSError: the folder cannot be written to, or data or weights cannot be read.

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
            parts = (run.model, run.heads, run.ema, run.optimizer)
            step, seconds = load_state(out / STATE, config, task.fingerprint, *parts)
            log = curve.read_log(out / LOG)[:step]
        if tell and task.summary:
            tell(task.summary)
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / RECIPE, config.to_json())
        write_text(out / LOG, "".join(json.dumps(entry) + "\n" for entry in log))
        end = config.steps if stop_after is None else min(stop_after, config.steps)
        started = saved = time.monotonic()
        pause = save_seconds
        with _progress_bar(step, config.steps, progress) as bar, open(out / LOG, "a", encoding="utf-8") as log_file:
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
    """Draw the steps of the diffusion to train at, and the noise, from torch's CPU generator whatever the device.

    Args:
        num_timesteps: length T of the diffusion.
        noisy_share: see ``TrainConfig``.
        shape: shape of the batch's pictures.

    Returns:
        Steps, int64 ``[B]``, and noise, float32 of ``shape``.
    """
    t = torch.randint(num_timesteps, shape[:1])
    noise = torch.randn(shape)
    if noisy_share:
        latest = num_timesteps - torch.randint(math.ceil(_NOISY * num_timesteps), t.shape) - 1
        t = torch.where(torch.rand(t.shape) < noisy_share, latest, t)
    return t, noise


class _Run:
    """Task, average and optimizer of one run."""

    def __init__(self, config: TrainConfig, task: Task, device: torch.device) -> None:
        self.config = config
        self.task = task
        self.device = device
        self.model = task.model.to(device)
        if config.channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.heads = task.heads.to(device)
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.ema = EMA(self.model, config.ema_decay)
        self.optimizer = torch.optim.AdamW(
            [*self.parameters, *self.heads.parameters()],
            lr=config.learning_rate,
            betas=(0.9, config.beta2),
            weight_decay=config.weight_decay,
        )
        self.num_timesteps = task.meta.num_timesteps
        self.loss = HybridLoss(Schedule.named(task.meta.schedule, self.num_timesteps), config.mse_weight_cap)
        threads = max(torch.get_num_threads() // config.shards, 1)
        self.pool = ThreadPoolExecutor(config.shards, initializer=torch.set_num_threads, initargs=(threads,))

    def step(self, step: int) -> dict[str, float]:
        """Make one optimizer step; returns the log entry."""
        config = self.config.at(step)
        self._start_anew(self.task.before(step))
        learning_rate = config.learning_rate_at(step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
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
        values = {name: torch.stack([part[name] for part in terms]).sum() for name in terms[0]}
        values["grad_norm"] = norm
        return {"step": step + 1, **{name: float(f"{value.item():.5g}") for name, value in values.items()}}

    def _start_anew(self, parameters: list[nn.Parameter]) -> None:
        """Forget average and optimizer state of parameters that were set anew."""
        changed = set(parameters)
        self.ema.reset((name, parameter) for name, parameter in self.model.named_parameters() if parameter in changed)
        for parameter in parameters:
            self.optimizer.state.pop(parameter, None)

    def _shard(
        self, shard: dict[str, Tensor], trained: list[nn.Parameter], config: TrainConfig
    ) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        """A shard's part of the batch's mean losses, the weighted sum first, and the sum's gradient."""
        x_start, t, noise = shard["images"], shard["t"], shard["noise"]
        x_t = self.loss.q_sample(x_start, t, noise)
        if config.channels_last:
            x_t = x_t.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.bf16):
            text = self.model.get_text_emb(shard["tokens"], shard["mask"])
            output = self.model(x_t, t, **text, **self.task.conditioning(shard)).float()
        terms = self.loss(output, x_start, x_t, t, noise)
        others = self.task.losses(shard, text, config)
        loss = terms.loss.sum()
        for weight, other in others.values():
            if weight:
                loss = loss + weight * other
        sums = {"loss": loss, "mse": terms.mse.sum(), "vlb": terms.vlb.sum()}
        sums |= {name: other for name, (_, other) in others.items()}
        parts = {name: value / config.batch_size for name, value in sums.items()}
        gradients = torch.autograd.grad(parts["loss"], trained)
        return {name: part.detach() for name, part in parts.items()}, gradients

    def save(self, out: Path, step: int, seconds: float) -> None:
        """Write the averaged weights, then the state: where there is a state, there are weights."""
        averaged = self.task.empty_model()
        averaged.load_state_dict({name: value.cpu() for name, value in self.ema.shadow.items()}, assign=True)
        recipe = {**dataclasses.asdict(self.config), "steps_made": step}
        save_checkpoint(out / CHECKPOINT, averaged, dataclasses.replace(self.task.meta, recipe=recipe))
        if self.task.glide:
            with replacing(out / GLIDE) as temporary:
                torch.save(dict(averaged.state_dict()), temporary)
        parts = (self.model, self.heads, self.ema, self.optimizer)
        save_state(out / STATE, self.config, self.task.fingerprint, step, seconds, *parts)

    def close(self) -> None:
        """End the threads."""
        self.task.close()
        self.pool.shutdown(cancel_futures=True)


def _split(tensors: dict[str, Tensor], parts: int) -> list[dict[str, Tensor]]:
    """At most ``parts`` parts of the rows of all tensors."""
    chunks = zip(*(tensor.chunk(parts) for tensor in tensors.values()), strict=True)
    return [dict(zip(tensors, chunk, strict=True)) for chunk in chunks]


def _progress_bar(step: int, steps: int, show: bool) -> Any:
    """A tqdm bar over steps."""
    from tqdm import tqdm

    return tqdm(total=steps, initial=step, unit="step", disable=not show, mininterval=1.0)


def main(argv: list[str] | None = None) -> int:
    """Train from the command line: ``python -m fastcfg.training.train --recipe recipe.json --out DIR``."""
    parser = argparse.ArgumentParser(description="Train a model by a recipe.")
    parser.add_argument("--recipe", required=True, help="JSON file of a recipe's settings")
    parser.add_argument("--out", required=True, help="folder to write to")
    parser.add_argument("--resume", action="store_true", help="go on from the state in the folder")
    arguments = parser.parse_args(argv)
    try:
        result = train(read_recipe(arguments.recipe), arguments.out, resume=arguments.resume)
    except (OSError, ValueError) as error:
        parser.exit(2, f"train: {error}\n")
    print(f"{result.steps} steps in {result.seconds / 60:.1f} min, loss {result.loss:.4f}: {result.checkpoint}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
