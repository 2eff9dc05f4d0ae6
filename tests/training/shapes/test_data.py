"""Batches of shapes: they depend on seed and step alone, and drop as many captions as asked."""

from __future__ import annotations

import pytest
import torch

from fastcfg.models import Tokenizer
from fastcfg.training.shapes.config import ShapesConfig
from fastcfg.training.shapes.data import ShapesData
from fastcfg.training.shapes.scenes import MAX_CAPTION_WORDS, VOCABULARY

pytestmark = pytest.mark.quick

TOKENIZER = Tokenizer.word_level(VOCABULARY)


def make_data(batch_size: int = 4, seed: int = 3, cond_drop: float = 0.12) -> ShapesData:
    return ShapesData(ShapesConfig(batch_size=batch_size, seed=seed, cond_drop=cond_drop), TOKENIZER)


def test_dropped_captions_are_empty_and_as_many_as_asked() -> None:
    batches = [make_data(batch_size=250, cond_drop=0.15).batch(step) for step in range(6)]
    dropped = torch.cat([~batch["mask"].any(dim=1) for batch in batches])
    # Binomial: the standard deviation is 0.009.
    assert abs(dropped.float().mean().item() - 0.15) < 0.02
    empty = TOKENIZER.padded_tokens_and_mask([], MAX_CAPTION_WORDS)[0]
    assert (torch.cat([batch["tokens"] for batch in batches])[dropped] == torch.tensor(empty)).all()
    assert make_data(batch_size=250, cond_drop=0.0).batch(0)["mask"].any(dim=1).all()


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    first, second = make_data(), make_data()
    second.batch(0)
    assert torch.equal(first.batch(5)["images"], second.batch(5)["images"])
    assert torch.equal(first.batch(5)["tokens"], second.batch(5)["tokens"])
    assert not torch.equal(first.batch(5)["images"], first.batch(6)["images"])
    assert not torch.equal(first.batch(5)["images"], make_data(seed=4).batch(5)["images"])
    assert first.batch(5)["images"].shape == (4, 3, 32, 32)
