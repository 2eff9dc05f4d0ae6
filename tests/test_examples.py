"""The examples of the docstrings and of the docs run, and print what they say."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path
from typing import Any

import pytest
from support import ROOT

from benchmarks.suite.foreign import load_diffusers, load_k_diffusion

MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted((ROOT / "fastcfg").rglob("*.py"))
    if ">>>" in path.read_text(encoding="utf-8")
]
# What an example takes that is not here.
ELSEWHERE = {
    "fastcfg.frontends.accelerate.accelerate": "an object of guided-diffusion",
    "fastcfg.frontends.diffusers.fuse": "pipelines: tests/frontends/test_stock_pipelines.py",
    "fastcfg.frontends.k_diffusion.fuse": "a model",
    "fastcfg.models.checkpoint.save_checkpoint": "a trained network",
    "fastcfg.models.clip.CLIPModel": "GLIDE's weights",
    "fastcfg.models.loading.load_network": "GLIDE's weights",
    "fastcfg.models.text2im.Text2ImUNet.precompute": "a network",
    "fastcfg.models.weights.read_state_dict": "GLIDE's weights",
    "fastcfg.pipelines.text_to_image.TextToImage": "20 s: tests/pipelines/test_text_to_image.py",
    "fastcfg.training.train.train": "a training run: tests/training/test_train.py",
    "fastcfg.pipelines.upsampler.Upsampler": "GLIDE's weights",
}
OTHERS = {"diffusers": load_diffusers, "k_diffusion": load_k_diffusion}

# What the blocks of a document take for granted. Every document with Python in it is here.
MODEL = "import torch\nmodel = lambda x, t, **conditioning: torch.cat([x, x], dim=1)"
LABELS = "labels = torch.ones(16, dtype=torch.int64)"
PIPELINE = (
    "from types import SimpleNamespace\nimport diffusers\n"
    "pipeline = SimpleNamespace(scheduler=diffusers.DDIMScheduler())"
)
GLIDE = (
    "import fastcfg\nfrom fastcfg.frontends.glide import create_gaussian_diffusion\n"
    "model_fn, batch, model_kwargs = model, 1, {}\n"
    "diffusion = create_gaussian_diffusion(steps=100, noise_schedule='linear', timestep_respacing='2')"
)
BEFORE = {
    "CONTRIBUTING.md": "",
    "README.md": f"{MODEL}\n{LABELS}",
    "docs/compiler.md": f"{MODEL}\n{PIPELINE}\nfrom fastcfg.compiler import compile_sampler",
    "docs/conditioning.md": "",
    "docs/descendants.md": "import torch\nfrom support.siblings import *\n"
    "net, gnet, diffusion, transport = Network(), Network(), DenoisingDiffusion(Network()), Transport()\n"
    "latents, class_labels, low = torch.randn(2, 3, 8, 8), torch.tensor([1.0, 2.0]), torch.randn(2, 3, 8, 8)\n"
    "noise_schedule, cond, generator = NoiseScheduleVP(), torch.randn(2, 5), DummyGenerator()\n"
    "model_fn, latent_diffusion = model_wrapper(net, noise_schedule), LatentDiffusion()\n"
    "karras, super_resolution, sigmas = KarrasDenoiser(), SuperResolution(), torch.tensor([80.0, 3.0, 0.2, 0.0])\n"
    "sample_heun = sample_karras_heun",
    "docs/drop_ins.md": f"import k_diffusion.sampling\n{MODEL}\n{GLIDE}",
    "docs/graphs.md": "",
    "docs/guidance.md": "from dataclasses import dataclass\nfrom fastcfg import GramGuidance",
    "docs/index.md": f"{MODEL}\n{LABELS}",
    "docs/prompts.md": "",
    "docs/recipes.md": "",
    "docs/runs.md": "import fastcfg",
    "docs/state.md": "import torch\nmodel = lambda x, t: torch.tanh(x)",
    "docs/solvers.md": "from fastcfg import sigmas, solvers\nfrom fastcfg.solvers import Denoiser\n"
    "model = lambda x, t: -x",
}


def absent(text: str) -> list[str]:
    """The packages that a text imports and that are not there."""
    return [name for name, load in OTHERS.items() if re.search(rf"(from|import) {name}\b", text) and load() is None]


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    examples = [found for found in doctest.DocTestFinder().find(importlib.import_module(name)) if found.examples]
    assert examples
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    for example in examples:
        if example.name not in ELSEWHERE and not absent(example.docstring):
            runner.run(example)
    assert not runner.failures


def blocks(name: str) -> list[str]:
    """The Python of a document."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_every_document_with_python_is_run() -> None:
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    names = {path.relative_to(ROOT).as_posix() for path in documents}
    assert {name for name in names if blocks(name)} == set(BEFORE)


@pytest.mark.parametrize("name", BEFORE)
def test_documents(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = [BEFORE[name], *(block.replace("model = ...", "...") for block in blocks(name))]
    if missing := absent("\n".join(source)):
        pytest.skip(f"not installed: {missing}")
    monkeypatch.chdir(tmp_path)
    given: dict[str, Any] = {}
    for block in source:
        exec(block, given)
