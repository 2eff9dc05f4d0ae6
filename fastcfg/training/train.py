"""Training a text-conditional model for classifier-free guidance on captioned shapes."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastcfg.files import write_text
from fastcfg.models.checkpoint import CheckpointMeta, save_checkpoint
from fastcfg.models.text2im import Text2ImUNet
from fastcfg.models.tokenizer import Tokenizer
from fastcfg.schedule import Schedule
from fastcfg.training import curve
from fastcfg.training.config import TrainConfig
from fastcfg.training.data import ShapesData
from fastcfg.training.ema import EMA
from fastcfg.training.layout import LayoutHead
from fastcfg.training.losses import HybridLoss
from fastcfg.training.reading import ReadingHeads, reading_parameters, train_reading
from fastcfg.training.shapes import IMAGE_SIZE, VOCABULARY
from fastcfg.training.state import load_state, save_state

RECIPE, STATE, CHECKPOINT, LOG, PLOT = "recipe.json", "state.pt", "model.safetensors", "log.jsonl", "loss_curve.png"

# Captions are short and their meaning hangs on word order, so places start as loud as words; the constructor leaves
# them a hundred times quieter.
_TEXT_INIT_STD = 0.3

# The part of the diffusion that `noisy_share` adds to.
_NOISY = 0.15


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a run left behind.

    Attributes:
        steps: steps made in all, resumed ones included.
        seconds: time they took.
        loss: mean loss of the last tenth of the logged steps.
        checkpoint: the averaged weights.
    """

    steps: int
    seconds: float
    loss: float
    checkpoint: Path


def build_model(config: TrainConfig) -> Text2ImUNet:
    """The network of a recipe with its initial weights, which depend on the recipe's seed alone.

    Args:
        config: the recipe.

    Returns:
        The network in train mode on the CPU, its tokenizer as attribute.

    Raises:
        ValueError: the recipe's ``model`` does not describe a network.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_step_seed(config.seed, "weights"))
        try:
            model = Text2ImUNet(tokenizer=Tokenizer.word_level(VOCABULARY), **config.model)
        except TypeError as error:
            raise ValueError(f"model: got {config.model}, expected arguments of Text2ImUNet ({error})") from error
        for weight in (model.token_embedding.weight, model.positional_embedding, model.padding_embedding):
            nn.init.normal_(weight, std=_TEXT_INIT_STD)
    return model.train()


def train(
    config: TrainConfig,
    out_dir: str | os.PathLike[str],
    *,
    resume: bool = False,
    progress: bool = True,
    device: str = "cpu",
    save_seconds: float = 180.0,
    stop_after: int | None = None,
) -> TrainResult:
    """Train by a recipe. Writes into ``out_dir``: recipe, log, loss curve, state, and the averaged weights.

    State and weights are also written every ``save_seconds``, so an interrupted run loses little: ``resume=True`` goes
    on from the state, and the result is the same, bit for bit, as without the interruption.

    Args:
        config: the recipe.
        out_dir: folder to write to, made if missing.
        resume: go on from the state in ``out_dir``.
        progress: show a progress bar on stderr.
        device: where to train.
        save_seconds: time between writes.
        stop_after: stop once this many steps are made in all, as an interruption would.

    Returns:
        The result.

    Raises:
        ValueError: a recipe that does not fit the network or the state; a folder that holds a run, without ``resume``.
        OSError: the folder cannot be written to.

    Example:
        >>> result = train(TrainConfig(steps=100), "run", progress=False)
        >>> model, tokenizer, meta = load_checkpoint(result.checkpoint)
    """
    out = Path(out_dir)
    run = _Run(config, torch.device(device))
    step, seconds, log = 0, 0.0, []
    if resume:
        step, seconds = load_state(out / STATE, config, run.model, run.heads, run.ema, run.optimizer)
        log = curve.read_log(out / LOG)[:step]
    elif (out / STATE).exists():
        raise ValueError(f"out_dir: got {out}, which holds a run, expected resume or another folder")
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / RECIPE, config.to_json())
    write_text(out / LOG, "".join(json.dumps(entry) + "\n" for entry in log))
    end = config.steps if stop_after is None else min(stop_after, config.steps)
    started = saved = time.monotonic()
    with _progress_bar(step, config.steps, progress) as bar, open(out / LOG, "a", encoding="utf-8") as log_file:
        while step < end:
            if lessons := config.lessons_at(step):
                run.read(lessons)
            entry = run.step(step)
            step += 1
            log.append(entry)
            log_file.write(json.dumps(entry) + "\n")
            bar.update(1)
            now = time.monotonic()
            if step % 20 == 0:
                loss = np.mean([e["loss"] for e in log[-100:]])
                rate = (bar.format_dict["rate"] or 0.0) * config.batch_size
                bar.set_postfix(loss=f"{loss:.4f}", images_per_s=f"{rate:.0f}", refresh=False)
            if now - saved > save_seconds and step < end:
                log_file.flush()
                run.save(out, step, seconds + now - started)
                saved = now
    seconds += time.monotonic() - started
    run.save(out, step, seconds)
    curve.plot(log, out / PLOT)
    tail = log[-max(len(log) // 10, 1) :]
    return TrainResult(step, seconds, float(np.mean([e["loss"] for e in tail])), out / CHECKPOINT)


def draw_noise(config: TrainConfig, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Draw the steps of the diffusion to train at, and the noise, from torch's CPU generator whatever the device.

    Args:
        config: the recipe.
        shape: shape of the batch's pictures.

    Returns:
        Steps, int64 ``[B]``, and noise, float32 of ``shape``.
    """
    t = torch.randint(config.num_timesteps, shape[:1])
    noise = torch.randn(shape)
    if config.noisy_share:
        latest = config.num_timesteps - torch.randint(math.ceil(_NOISY * config.num_timesteps), t.shape) - 1
        t = torch.where(torch.rand(t.shape) < config.noisy_share, latest, t)
    return t, noise


class _Run:
    """Model, average, optimizer and data of one run."""

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        self.config = config
        self.device = device
        self.model = build_model(config).to(device)
        if config.channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_step_seed(config.seed, "layout"))
            self.layout = LayoutHead(self.model)
            self.reading = ReadingHeads(self.model.xf_width)
            self.heads = nn.ModuleList([self.layout, self.reading]).to(device)
        self.parameters = list(self.model.parameters())
        self.ema = EMA(self.model, config.ema_decay)
        self.optimizer = torch.optim.AdamW(
            [*self.parameters, *self.heads.parameters()],
            lr=config.learning_rate,
            betas=(0.9, config.beta2),
            weight_decay=config.weight_decay,
        )
        assert isinstance(self.model.tokenizer, Tokenizer)
        self.data = ShapesData(config, self.model.tokenizer)
        self.loss = HybridLoss(Schedule.named(config.schedule, config.num_timesteps), config.mse_weight_cap)
        threads = max(torch.get_num_threads() // config.shards, 1)
        self.pool = ThreadPoolExecutor(config.shards, initializer=torch.set_num_threads, initargs=(threads,))

    def read(self, steps: int) -> None:
        """Train the text transformer alone; optimizer and average of its parameters start anew."""
        heads, _ = train_reading(self.model, dataclasses.replace(self.config, reading_steps=steps))
        self.reading.load_state_dict(heads.state_dict())
        changed = reading_parameters(self.model)
        self.ema.reset(changed)
        for parameter in [*(parameter for _, parameter in changed), *self.reading.parameters()]:
            self.optimizer.state.pop(parameter, None)

    def step(self, step: int) -> dict[str, float]:
        """Make one optimizer step; returns the log entry."""
        config = self.config.at(step)
        learning_rate = config.learning_rate_at(step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        batch = self.data.batch(step)
        cuda = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            torch.manual_seed(_step_seed(self.config.seed, "step", step))
            t, noise = draw_noise(config, batch.images.shape)
            tensors = {**vars(batch), "t": t, "noise": noise}
            parts = [tensor.to(self.device).chunk(config.shards) for tensor in tensors.values()]
            shards = [dict(zip(tensors, shard, strict=True)) for shard in zip(*parts, strict=True)]
            trained = list(self.parameters)
            if config.layout_weight:
                trained += self.layout.parameters()
            if config.reading_weight:
                trained += self.reading.parameters()
            results = list(self.pool.map(self._shard, shards, itertools.repeat(trained), itertools.repeat(config)))
        self.optimizer.zero_grad(set_to_none=True)
        loss, mse, vlb, layout, reading = (
            torch.stack(parts).sum() for parts in zip(*(terms for terms, _ in results), strict=True)
        )
        for parameter, *gradients in zip(trained, *(grads for _, grads in results), strict=True):
            parameter.grad = torch.stack(gradients).sum(dim=0) if len(gradients) > 1 else gradients[0]
        norm = nn.utils.clip_grad_norm_(trained, self.config.grad_clip)
        self.optimizer.step()
        self.ema.update(self.model)
        values = {"loss": loss, "mse": mse, "vlb": vlb, "layout": layout, "reading": reading, "grad_norm": norm}
        return {"step": step + 1, **{name: float(f"{value.item():.5g}") for name, value in values.items()}}

    def _shard(
        self, shard: dict[str, Tensor], trained: list[nn.Parameter], config: TrainConfig
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """A shard's part of the batch's mean losses, the weighted sum first, and the sum's gradient."""
        x_start, t, noise = shard["images"], shard["t"], shard["noise"]
        x_t = self.loss.q_sample(x_start, t, noise)
        if config.channels_last:
            x_t = x_t.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.bf16):
            text = self.model.get_text_emb(shard["tokens"], shard["mask"])
            output = self.model(x_t, t, **text).float()
        terms = self.loss(output, x_start, x_t, t, noise)
        loss, layout, reading = terms.loss.sum(), output.new_zeros(()), output.new_zeros(())
        if config.layout_weight:
            layout = self.layout(shard["colours"], shard["shapes"]).sum()
            loss = loss + config.layout_weight * layout
        if config.reading_weight:
            reading = self.reading(text["xf_out"], shard["at_words"], shard["about"])[0] * len(t)
            loss = loss + config.reading_weight * reading
        parts = [part / config.batch_size for part in (loss, terms.mse.sum(), terms.vlb.sum(), layout, reading)]
        return tuple(part.detach() for part in parts), torch.autograd.grad(parts[0], trained)

    def save(self, out: Path, step: int, seconds: float) -> None:
        """Write the state and the averaged weights."""
        save_state(out / STATE, self.config, step, seconds, self.model, self.heads, self.ema, self.optimizer)
        averaged = build_model(self.config)
        self.ema.copy_to(averaged)
        recipe = {**dataclasses.asdict(self.config), "steps_made": step}
        meta = CheckpointMeta(self.config.model, self.config.schedule, self.config.num_timesteps, IMAGE_SIZE, recipe)
        save_checkpoint(out / CHECKPOINT, averaged, meta)


def _step_seed(seed: int, *path: str | int) -> int:
    """A torch seed for one purpose, unrelated to those of other purposes."""
    words = [int.from_bytes(part.encode(), "little") if isinstance(part, str) else part for part in path]
    return int(np.random.SeedSequence([seed, *words]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _progress_bar(step: int, steps: int, show: bool) -> Any:
    """A tqdm bar over steps."""
    from tqdm import tqdm

    return tqdm(total=steps, initial=step, unit="step", disable=not show, mininterval=1.0)


def main(argv: list[str] | None = None) -> int:
    """Train from the command line: ``python -m fastcfg.training.train --recipe recipe.json --out DIR``."""
    parser = argparse.ArgumentParser(description="Train a model by a recipe.")
    parser.add_argument("--recipe", required=True, help="JSON file of TrainConfig's settings")
    parser.add_argument("--out", required=True, help="folder to write to")
    parser.add_argument("--resume", action="store_true", help="go on from the state in the folder")
    arguments = parser.parse_args(argv)
    try:
        result = train(TrainConfig.from_file(arguments.recipe), arguments.out, resume=arguments.resume)
    except (OSError, ValueError) as error:
        parser.exit(2, f"train: {error}\n")
    print(f"{result.steps} steps in {result.seconds / 60:.1f} min, loss {result.loss:.4f}: {result.checkpoint}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
