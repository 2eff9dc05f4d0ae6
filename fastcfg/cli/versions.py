"""Versions of the installed packages, and the checkout's commit."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from fastcfg import __version__

REQUIRED = ("torch", "triton", "numpy", "safetensors", "tokenizers", "pillow", "tqdm")
OPTIONAL = ("nvidia-ml-py", "matplotlib", "diffusers", "k-diffusion")


def versions(*, optional: bool = False) -> dict[str, str | None]:
    """Versions by name, fastcfg's and Python's first; None for packages that are not installed. `optional` includes
    packages that only some features need."""
    found: dict[str, str | None] = {"fastcfg": __version__, "python": platform.python_version()}
    for name in REQUIRED + (OPTIONAL if optional else ()):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def commit() -> str | None:
    """The checkout's commit; None for an installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(root), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
