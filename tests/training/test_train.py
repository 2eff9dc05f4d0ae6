"""The training loop on a tiny network: deterministic, resumable, and it learns."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support.trees import assert_equal_trees
from torch import nn

from fastcfg.models.checkpoint import load_checkpoint
from fastcfg.schedule import Schedule
from fastcfg.training import curve
from fastcfg.training.ema import EMA
from fastcfg.training.losses import HybridLoss
from fastcfg.training.recipes import make_recipe, read_recipe
from fastcfg.training.shapes.config import ShapesConfig
from fastcfg.training.shapes.data import ShapesData
from fastcfg.training.shapes.layout import LayoutHead
from fastcfg.training.shapes.reading import ReadingHeads, train_reading
from fastcfg.training.shapes.task import build_model
from fastcfg.training.task import seed_for
from fastcfg.training.train import LOG, PLOT, RECIPE, STATE, draw_noise, train

MODEL = {
    "xf_width": 32,
    "xf_layers": 1,
    "xf_heads": 2,
    "model_channels": 32,
    "channel_mult": [1, 1],
    "attention_resolutions": [2],
}
TINY = ShapesConfig.from_dict(
    {
        "steps": 6,
        "batch_size": 4,
        "warmup_steps": 2,
        "decay_steps": 2,
        "ema_decay": 0.9,
        "bf16": False,
        "reading_steps": 0,
        "layout_weight": 0.03,
        "noisy_share": 0.0,
        "seed": 3,
        "model": MODEL,
    }
)


# For comparisons of whole runs: half the pictures, half the time.
SMALL = dataclasses.replace(TINY, batch_size=2)


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(path)[0].state_dict()


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = train(SMALL, tmp_path / "whole", progress=False)
    train(SMALL, tmp_path / "parts", progress=False, stop_after=3)
    # Lines logged after the last written state, as a killed run leaves them, are made again.
    with open(tmp_path / "parts" / LOG, "a", encoding="utf-8") as log:
        log.write(json.dumps({"step": 4, "loss": -1.0}) + "\n")
    parts = train(SMALL, tmp_path / "parts", progress=False, resume=True)
    assert (whole.steps, whole.loss) == (parts.steps, parts.loss) == (6, whole.loss)
    states = [torch.load(tmp_path / name / STATE, weights_only=True) for name in ("whole", "parts")]
    for state in states:
        del state["seconds"]
    assert_equal_trees(*states)
    assert_equal_trees(weights(whole.checkpoint), weights(parts.checkpoint))
    assert (tmp_path / "whole" / LOG).read_text() == (tmp_path / "parts" / LOG).read_text()
    train(dataclasses.replace(SMALL, seed=4), tmp_path / "other", progress=False, stop_after=1)
    first, other = (curve.read_log(tmp_path / name / LOG)[0] for name in ("whole", "other"))
    assert other["loss"] != first["loss"]


def test_a_run_is_what_its_recipe_says_written_out(tmp_path: Path) -> None:
    # The whole of a shapes run in plain steps, bit for bit: how the loop is organised must not change what it computes.
    config = dataclasses.replace(
        TINY, steps=3, shards=1, noisy_share=0.4, mse_weight_cap=5.0, reading_steps=2, reading_batch_size=8
    )
    model = build_model(config)
    torch.manual_seed(seed_for(config.seed, "layout"))
    layout, reading = LayoutHead(model), ReadingHeads(model.xf_width)
    lessons, _ = train_reading(model, config)
    reading.load_state_dict(lessons.state_dict())
    parameters = [*model.parameters(), *layout.parameters(), *reading.parameters()]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, config.beta2), weight_decay=config.weight_decay)
    average = EMA(model, config.ema_decay)
    hybrid = HybridLoss(Schedule.named(config.schedule, config.num_timesteps), config.mse_weight_cap)
    losses = []
    for step in range(3):
        batch = ShapesData(config, model.tokenizer).batch(step)
        torch.manual_seed(seed_for(config.seed, "step", step))
        t, noise = torch.randint(1000, (4,)), torch.randn(4, 3, 32, 32)
        late = 1000 - torch.randint(150, (4,)) - 1
        t = torch.where(torch.rand(4) < 0.4, late, t)
        x_t = hybrid.q_sample(batch["images"], t, noise)
        text = model.get_text_emb(batch["tokens"], batch["mask"])
        terms = hybrid(model(x_t, t, **text), batch["images"], x_t, t, noise)
        named = layout(batch["colours"], batch["shapes"]).sum()
        read = reading(text["xf_out"], batch["at_words"], batch["about"])[0] * 4
        loss = (terms.loss.sum() + config.layout_weight * named + config.reading_weight * read) / 4
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, config.grad_clip)
        optimizer.param_groups[0]["lr"] = config.learning_rate_at(step)
        optimizer.step()
        average.update(model)
        losses.append(float(f"{loss.item():.5g}"))
    result = train(config, tmp_path, progress=False)
    state = torch.load(tmp_path / STATE, weights_only=True)
    assert_equal_trees(state["model"], dict(model.state_dict()))
    assert_equal_trees(state["ema"]["shadow"], average.shadow)
    assert_equal_trees(weights(result.checkpoint), {n: v.half().float() for n, v in average.shadow.items()})
    assert [entry["loss"] for entry in curve.read_log(tmp_path / LOG)] == losses


# Six steps of 5 seconds, to be saved every 4: 0.4 seconds of saving ask for 8 in between, 9 for 180.
@pytest.mark.parametrize(
    ("saving", "saves"), [(0.0, [1, 2, 3, 4, 5, 6]), (0.4, [1, 3, 5, 6]), (9.0, [1, 6])], ids=["fast", "slow", "slower"]
)
def test_saving_takes_a_twentieth_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saving: float, saves: list[int]
) -> None:
    clock = [0.0]
    calls = []

    def save(run: object, out: Path, step: int, seconds: float) -> None:
        calls.append(step)
        clock[0] += saving

    def step(run: object, step: int) -> dict[str, float]:
        clock[0] += 5.0
        return {"step": step + 1, "loss": 1.0, "mse": 1.0}

    monkeypatch.setattr("fastcfg.training.train.time.monotonic", lambda: clock[0])
    monkeypatch.setattr("fastcfg.training.train._Run.save", save)
    monkeypatch.setattr("fastcfg.training.train._Run.step", step)
    train(TINY, tmp_path, progress=False, save_seconds=4.0)
    assert calls == saves


@pytest.mark.usefixtures("loss_curve")
def test_what_a_run_leaves_behind(tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, steps=2, bf16=True, channels_last=True)
    result = train(config, tmp_path / "new" / "run", progress=False)
    out = tmp_path / "new" / "run"
    assert read_recipe(out / RECIPE) == config
    entries = curve.read_log(out / LOG)
    assert [entry["step"] for entry in entries] == [1, 2]
    assert (out / PLOT).read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in out.iterdir()) == sorted([RECIPE, LOG, PLOT, STATE, result.checkpoint.name])
    model, tokenizer, meta = load_checkpoint(result.checkpoint)
    assert (meta.schedule, meta.num_timesteps, meta.image_size) == ("squaredcos_cap_v2", 1000, 32)
    assert meta.recipe["steps_made"] == 2
    state = torch.load(out / STATE, weights_only=True)
    for name, value in model.named_parameters():
        torch.testing.assert_close(value, state["ema"]["shadow"][name].half().float(), rtol=0, atol=0)
    assert tokenizer.unknown_words("a small red star above an orange cross") == []


def test_shards_only_change_rounding(tmp_path: Path) -> None:
    # But for the reading loss: each shard averages over its own questions.
    config = dataclasses.replace(TINY, steps=2, reading_weight=0.0)
    losses = [train(dataclasses.replace(config, shards=n), tmp_path / str(n), progress=False).loss for n in (1, 2, 3)]
    # Equal as far as the log's five digits show.
    np.testing.assert_allclose(losses, losses[0], rtol=5e-5)


def test_the_loss_falls(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, steps=24, learning_rate=6e-3, warmup_steps=3, decay_steps=6)
    train(config, tmp_path, progress=False)
    errors = [entry["mse"] for entry in curve.read_log(tmp_path / LOG)]
    # Noise predicted as zero has an error of 1. Measured: 0.90 at first, 0.16 at the end.
    assert np.mean(errors[:3]) > 0.85
    assert np.mean(errors[-10:]) < 0.3


def test_average_follows_its_formula() -> None:
    model = nn.Linear(2, 1, bias=False)
    ema = EMA(model, decay=0.5)
    expected = model.weight.detach().clone()
    for update in range(12):
        with torch.no_grad():
            model.weight += torch.tensor([[1.0, -2.0]])
        ema.update(model)
        decay = min(0.5, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * model.weight.detach()
    torch.testing.assert_close(ema.shadow["weight"], expected)
    with pytest.raises(ValueError, match=r"decay: got 1.0, expected 0 <= decay < 1"):
        EMA(model, 1.0)


def test_learning_rate_rises_stays_and_falls() -> None:
    config = ShapesConfig(steps=100, warmup_steps=9, decay_steps=20, learning_rate=1.0)
    rates = [config.learning_rate_at(step) for step in range(100)]
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10)
    assert set(rates[10:80]) == {1.0}
    fall = [0.5 + 0.5 * np.cos(np.pi * (k + 1) / 21) for k in range(20)]
    np.testing.assert_allclose(rates[80:], fall, atol=1e-12)


def test_a_run_can_be_given_another_length_before_its_decay(tmp_path: Path) -> None:
    train(SMALL, tmp_path, progress=False, stop_after=2)
    longer = dataclasses.replace(SMALL, steps=5, decay_steps=1)
    whole = train(longer, tmp_path / "whole", progress=False)
    resumed = train(longer, tmp_path, progress=False, resume=True)
    assert_equal_trees(weights(whole.checkpoint), weights(resumed.checkpoint))
    with pytest.raises(ValueError, match=r"resume: got a run of another length at step 5"):
        train(dataclasses.replace(longer, steps=9), tmp_path, progress=False, resume=True)


def test_reading_lessons_happen_once_where_the_recipe_says(tmp_path: Path) -> None:
    plain = dataclasses.replace(SMALL, steps=4)
    lessons = dataclasses.replace(plain, reading_batch_size=8, stages=[{"at": 2, "reading_steps": 2}])
    assert [lessons.lessons_at(step) for step in range(4)] == [0, 0, 2, 0]
    assert dataclasses.replace(lessons, reading_steps=7).lessons_at(0) == 7
    whole = weights(train(lessons, tmp_path / "whole", progress=False).checkpoint)
    before = dataclasses.replace(lessons, stages=[])
    for name, config, stop in (("before", before, 1), ("at", lessons, 2), ("after", lessons, 3)):
        train(config, tmp_path / name, progress=False, stop_after=stop)
        assert_equal_trees(whole, weights(train(lessons, tmp_path / name, progress=False, resume=True).checkpoint))
    without = weights(train(plain, tmp_path / "without", progress=False).checkpoint)
    assert not torch.equal(without["token_embedding.weight"], whole["token_embedding.weight"])
    with pytest.raises(ValueError, match=r"resume: got a recipe with reading_rate = 0.1, expected the state's 0.001"):
        train(dataclasses.replace(lessons, reading_rate=0.1), tmp_path / "whole", progress=False, resume=True)


def test_stages_change_settings_on_the_way(tmp_path: Path) -> None:
    stages = [{"at": 1, "layout_weight": 0.5}, {"at": 3, "noisy_share": 0.9, "layout_weight": 0.2}]
    plain = dataclasses.replace(SMALL, steps=4)
    staged = dataclasses.replace(plain, stages=stages)
    settings = [(staged.at(step).layout_weight, staged.at(step).noisy_share) for step in range(4)]
    assert settings == [(0.03, 0.0)] + [(0.5, 0.0)] * 2 + [(0.2, 0.9)]
    whole = weights(train(staged, tmp_path / "whole", progress=False).checkpoint)
    train(plain, tmp_path / "parts", progress=False, stop_after=1)
    first = dataclasses.replace(plain, stages=stages[:1])
    train(first, tmp_path / "parts", progress=False, resume=True, stop_after=3)
    assert_equal_trees(whole, weights(train(staged, tmp_path / "parts", progress=False, resume=True).checkpoint))
    with pytest.raises(ValueError, match=r"resume: got a recipe with noisy_share = 0.0, expected the state's 0.9"):
        train(first, tmp_path / "parts", progress=False, resume=True)
    unstaged = weights(train(plain, tmp_path / "plain", progress=False).checkpoint)
    assert not torch.equal(unstaged["out.2.weight"], whole["out.2.weight"])


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0.15), (0.6, 0.66)])
def test_noisy_share_draws_late_steps(share: float, expected: float) -> None:
    torch.manual_seed(0)
    t, noise = draw_noise(1000, share, torch.Size([10_000, 1, 1, 1]))
    # Binomial: the standard deviation is below 0.005.
    assert abs((t >= 850).float().mean().item() - expected) < 0.02
    assert (int(t.min()), int(t.max())) == (0, 999)
    assert noise.shape == (10_000, 1, 1, 1)
    assert abs(noise.std().item() - 1) < 0.03


def test_foreign_states_and_recipes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"resume: got .* not a file"):
        train(TINY, tmp_path, progress=False, resume=True)
    (tmp_path / STATE).write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"resume: got .* not a training state"):
        train(TINY, tmp_path, progress=False, resume=True)
    with pytest.raises(ValueError, match=r"out_dir: got .* holds a run"):
        train(TINY, tmp_path, progress=False)
    torch.save({"weights": torch.zeros(1)}, tmp_path / STATE)
    with pytest.raises(ValueError, match=r"resume: got .* not a training state"):
        train(TINY, tmp_path, progress=False, resume=True)
    run = tmp_path / "run"
    train(TINY, run, progress=False, stop_after=1)
    with pytest.raises(ValueError, match=r"resume: got a recipe with cond_drop = 0.3, expected the state's 0.12"):
        train(dataclasses.replace(TINY, cond_drop=0.3), run, progress=False, resume=True)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stepz": 1}, "recipe: got unknown settings stepz"),
        ({"steps": "many"}, "steps: got 'many', expected a value of type int"),
        ({"steps": 0}, "steps: got 0, expected at least 1"),
        ({"bf16": 1}, "bf16: got 1, expected a value of type bool"),
        ({"cond_drop": 1.0}, "cond_drop: got 1.0, expected 0 <= value < 1"),
        ({"learning_rate": float("nan")}, "learning_rate: got nan, expected a positive number"),
        ({"batch_size": 1}, "shards: got 2, expected 1 to batch_size"),
        ({"model": {"dropout": 0.1}}, "shards: got 2 with dropout, expected 1"),
        ([], "recipe: got list"),
        ({"stages": [{"at": 5, "batch_size": 1}]}, "stages: got .*expected an object of 'at', a step, and some of"),
        ({"stages": [{"layout_weight": 0.1}]}, "stages: got .*expected an object of 'at'"),
        ({"stages": [{"at": 5, "noisy_share": 2.0}]}, "noisy_share: got 2.0, expected 0 <= value <= 1"),
    ],
)
def test_bad_recipes_are_refused(values: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_recipe(values)  # type: ignore[arg-type]


def test_recipe_file_round_trip_and_errors(tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(TINY.to_json())
    assert read_recipe(path) == TINY
    path.write_text('{"steps": 1')
    with pytest.raises(ValueError, match=r"recipe .*json: got a file that is not JSON"):
        read_recipe(path)
    with pytest.raises(ValueError, match=r"model: got .*expected arguments of Text2ImUNet"):
        build_model(ShapesConfig.from_dict({"model": {"depth": 3}}))


def test_dropout_needs_one_shard_and_is_reproducible(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, steps=2, shards=1, model={**TINY.model, "dropout": 0.5})
    losses = [train(config, tmp_path / name, progress=False).loss for name in ("a", "b")]
    assert losses[0] == losses[1]


def test_global_random_state_is_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    train(dataclasses.replace(TINY, steps=1), tmp_path, progress=False)
    assert torch.equal(torch.get_rng_state(), before)


def test_thinned_curve_keeps_means() -> None:
    entries = [{"step": step + 1, "loss": float(step)} for step in range(1000)]
    thinned = curve.thin(entries, points=10)
    assert thinned["step"] == list(range(100, 1001, 100))
    np.testing.assert_allclose(thinned["loss"], 49.5 + 100 * np.arange(10))
    assert curve.thin(entries[:3])["loss"] == [0.0, 1.0, 2.0]
