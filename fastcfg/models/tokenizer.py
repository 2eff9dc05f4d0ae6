"""Text to token ids: GPT-2's byte-level BPE as GLIDE uses it, and small word-level vocabularies."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..utils.files import write_text

END_TOKEN = "<|endoftext|>"
UNKNOWN_TOKEN = "<|unknown|>"


class Tokenizer:
    """Tokenizer with GLIDE's interface (`glide_text2im.tokenizer.bpe.Encoder`), on the `tokenizers` library.

    Text is lower-cased with `str.lower()` and not changed further. No start or end token is added, and no text is
    special: `<|endoftext|>` is encoded like any other characters. The empty text has no ids. `n_vocab` is the number of
    ids, `end_token` that of `<|endoftext|>`, also used for padding.

    Example:
        >>> tokenizer = Tokenizer.word_level(["a", "red", "circle"])
        >>> tokenizer.encode("A red circle")
        [2, 3, 4]
        >>> tokenizer.padded_tokens_and_mask([2, 3, 4], 5)
        ([2, 3, 4, 0, 0], [True, True, True, False, False])
        >>> tokenizer.unknown_words("a red corgi")
        ['corgi']
    """

    def __init__(self, backend: Any) -> None:
        """Wrap a `tokenizers.Tokenizer`; ValueError if its vocabulary lacks `<|endoftext|>`."""
        self.n_vocab: int = backend.get_vocab_size()
        self.end_token: int = backend.token_to_id(END_TOKEN)
        self._backend, self._unknown_id = backend, backend.token_to_id(UNKNOWN_TOKEN)
        if self.end_token is None:
            raise ValueError(f"backend: got a vocabulary without {END_TOKEN!r}, expected it to pad with")

    @classmethod
    def from_gpt2_files(cls, encoder_json: str | os.PathLike[str], vocab_bpe: str | os.PathLike[str]) -> Tokenizer:
        """GLIDE's tokenizer, from GPT-2's two vocabulary files, each possibly gzipped (`.gz`).

        These are `encoder.json`, token to id, and `vocab.bpe`, merges by rank after a version line. OSError if a file
        cannot be read; ValueError if it is invalid.
        """
        from tokenizers import Tokenizer as Backend
        from tokenizers import decoders, models, pre_tokenizers

        try:
            vocabulary = json.loads(read_text(encoder_json))
            version, *lines = read_text(vocab_bpe).splitlines()
            if not version.startswith("#version"):
                raise ValueError(f"vocab_bpe: {os.fspath(vocab_bpe)} starts with {version[:40]!r}, expected '#version'")
            merges = [(left, right) for left, right in (line.split(" ") for line in lines if line)]
            backend = Backend(models.BPE(vocab=vocabulary, merges=merges))
        except OSError:
            raise
        except Exception as error:  # the library raises bare Exception for merges that are not in the vocabulary
            files = f"{os.fspath(encoder_json)}, {os.fspath(vocab_bpe)}"
            raise ValueError(f"encoder_json, vocab_bpe: got {files}, expected GPT-2's vocabulary ({error})") from error
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        return cls(backend)

    @classmethod
    def word_level(cls, vocabulary: Iterable[str]) -> Tokenizer:
        """A tokenizer of whole words and single punctuation marks, for small vocabularies.

        Id 0 is `<|endoftext|>`, 1 every unknown word, then follow the words in the given order. ValueError for a
        repeated word, or one that is not a lower-case word or punctuation mark.
        """
        from tokenizers import Tokenizer as Backend
        from tokenizers import models, pre_tokenizers

        splitter = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated")])
        ids = {END_TOKEN: 0, UNKNOWN_TOKEN: 1}
        for word in vocabulary:
            if [piece for piece, _ in splitter.pre_tokenize_str(word)] != [word] or word != word.lower():
                raise ValueError(f"vocabulary: got {word!r}, expected one lower-case word or punctuation mark")
            if word in ids:
                raise ValueError(f"vocabulary: got {word!r} twice, expected different words")
            ids[word] = len(ids)
        backend = Backend(models.WordLevel(ids, unk_token=UNKNOWN_TOKEN))
        backend.pre_tokenizer = splitter
        return cls(backend)

    @classmethod
    def from_json(cls, text: str) -> Tokenizer:
        """Read the JSON format of `to_json`; ValueError for anything else."""
        from tokenizers import Tokenizer as Backend

        try:
            backend = Backend.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"text: got {text[:40]!r}, expected a tokenizer in JSON ({error})") from error
        return cls(backend)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Read a file of `save`; ValueError for any other file."""
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"path: got {os.fspath(path)}, expected a file with a tokenizer ({error})") from error

    def to_json(self) -> str:
        """The whole tokenizer in the JSON format of the `tokenizers` library."""
        return self._backend.to_str(pretty=True)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `to_json` to a file, whole or not at all."""
        write_text(path, self.to_json())

    def encode(self, text: str) -> list[int]:
        """Ids of the lower-cased text; all words unknown to a word-level vocabulary get the same id.

        TypeError for anything but a string; ValueError for lone surrogates, which UTF-8 cannot encode.
        """
        return self._encode(text).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids, with spaces between words for word-level vocabularies; ValueError for unknown ids."""
        for token in ids:
            if not 0 <= token < self.n_vocab:
                raise ValueError(f"ids: got {token}, expected 0 to {self.n_vocab - 1}")
        return self._backend.decode(list(ids), skip_special_tokens=False)

    def unknown_words(self, text: str) -> list[str]:
        """The words of the text that the vocabulary lacks, each once, in order; none for byte-level vocabularies."""
        encoding, lowered = self._encode(text), text.lower()
        places = [at for token, at in zip(encoding.ids, encoding.offsets, strict=True) if token == self._unknown_id]
        return list(dict.fromkeys(lowered[start:stop] for start, stop in places))

    def padded_tokens_and_mask(self, tokens: Sequence[int], text_ctx: int) -> tuple[list[int], list[bool]]:
        """Cut ids, or pad them with `end_token`, to `text_ctx` ids; also returns their mask, True on real ids."""
        kept = list(tokens[:text_ctx])
        padding = text_ctx - len(kept)
        return kept + [self.end_token] * padding, [True] * len(kept) + [False] * padding

    def _encode(self, text: str) -> Any:
        """The library's encoding of the lower-cased text."""
        if not isinstance(text, str):
            raise TypeError(f"text: got {type(text).__name__}, expected str")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"text: got {text[:40]!r}, expected text that can be UTF-8 ({error.reason})") from error
        return self._backend.encode(text.lower(), add_special_tokens=False)


def read_text(path: str | os.PathLike[str]) -> str:
    """Contents of a UTF-8 file, unpacked if its name ends in `.gz`; ValueError if it is not UTF-8."""
    data = Path(path).read_bytes()
    return (gzip.decompress(data) if Path(path).suffix == ".gz" else data).decode("utf-8")
