"""What is installed."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from fastcfg import __version__

REQUIRED = ("torch", "triton", "numpy", "safetensors", "tokenizers", "pillow", "tqdm")
OPTIONAL = ("nvidia-ml-py", "matplotlib", "diffusers", "k-diffusion")


def versions(*, optional: bool = False) -> dict[str, str | None]:
    """Versions by name, Python's and fastcfg's first; None for packages that are not installed.

    Args:
        optional: also those of packages that only some features need.
    """
    found: dict[str, str | None] = {"fastcfg": __version__, "python": platform.python_version()}
    for name in REQUIRED + (OPTIONAL if optional else ()):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found
