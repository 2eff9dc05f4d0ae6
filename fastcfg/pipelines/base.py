"""What the pipelines share: a network with its tokenizer and schedule, and pictures drawn in batches."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from importlib.resources import as_file, files
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from ..engine.call import check_functions
from ..engine.noise import Generators
from ..engine.sampler import Sampler, Step
from ..guidance import Guidance, NoGuidance
from ..guidance.places import plan_for
from ..models.checkpoint import CheckpointMeta
from ..models.image_conditioned import InpaintText2ImUNet, SuperResInpaintText2ImUnet
from ..models.loading import load_network
from ..models.text2im import Text2ImUNet
from ..models.tokenizer import Tokenizer
from ..schedule import Schedule
from ..solvers.by_name import SOLVERS, solver_table
from ..table import StepTable
from ..utils.progress import progress_bar
from .inpainting import KnownPixels, checked_inpainting

__all__ = ["SOLVERS", "Drawing", "Pipeline", "Stage"]

_Self = TypeVar("_Self", bound="Pipeline")


@dataclass(frozen=True, eq=False)
class Drawing:
    """N pictures to draw, with the text and the seed of each.

    Attributes:
        guidance: with the branch cond and those of `others`.
        others: token ids of the text of each further branch, by name, the same for all pictures.
        inputs: what else the network is given, [N or 1, ...], in all branches.
        batch_size: pictures computed at once.
        generator: of torch's noise, one or one for each picture, in place of the seeds.
        cond_fn, progress, callback: as `TextToImage.sample`.
    """

    texts: Sequence[str]
    seeds: Sequence[int]
    guidance: Guidance = field(default_factory=NoGuidance)
    others: Mapping[str, Sequence[int]] = field(default_factory=dict)
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    batch_size: int = 64
    cond_fn: Callable[..., Tensor] | None = None
    progress: bool | str = False
    callback: Callable[[Step], None] | None = None
    generator: Generators | None = None


class Pipeline:
    """A text-conditional network with its tokenizer and noise schedule, ready to sample.

    A pipeline can be copied, pickled and saved with `torch.save`; buffers and graphs of its calls stay behind. Its
    attribute `schedule` is the noise schedule that the model was trained with.

    Args, also attributes:
        model: the network, with learned variances (it returns twice the image's channels).
        tokenizer: its tokenizer.
        meta: schedule and image size, as in a checkpoint.

    Raises:
        ValueError: a network for another purpose, without text or without learned variances.
    """

    _NETWORKS: ClassVar[tuple[str, ...]]  # the classes of network that a pipeline runs
    _PURPOSE: ClassVar[str]
    _EMBEDDED: ClassVar[str | None] = None  # the file of weights that comes with the package

    def __init__(self, model: Text2ImUNet, tokenizer: Tokenizer, meta: CheckpointMeta) -> None:
        if meta.network not in self._NETWORKS:
            expected = f"{' or '.join(self._NETWORKS)}, to {self._PURPOSE}"
            raise ValueError(f"model: got a {meta.network}, expected a {expected}")
        if not model.xf_width:
            raise ValueError("model: got a network without text (xf_width = 0), expected one with text")
        self._channels = int(meta.model["in_channels"])
        if model.out_channels != 2 * self._channels:
            expected = f"{2 * self._channels}: the noise and its learned variance"
            raise ValueError(f"model: got {model.out_channels} output channels, expected {expected}")
        self.model, self.tokenizer, self.meta = model, tokenizer, meta
        self.schedule = Schedule.named(meta.schedule, meta.num_timesteps)
        self._forget()

    def _forget(self) -> None:
        self._sampler: Sampler | None = None
        self._options: tuple[Any, ...] = ()
        self._known: KnownPixels | None = None
        self._seeds: list[int] = []

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name in _KEPT}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    @classmethod
    def load(
        cls: type[_Self],
        path: str | os.PathLike[str] | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        *,
        tokenizer: Tokenizer | str | os.PathLike[str] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> _Self:
        """Read a checkpoint or a state dict.

        Args:
            path: a file written by `fastcfg train`, or a state dict of GLIDE's, with or without inpainting: `base.pt`
                or `base_inpaint.pt` for `TextToImage`, `upsample.pt` or `upsample_inpaint.pt` for `Upsampler`. None is
                the model that comes with the package, a `TextToImage`.
            device: where to run it.
            dtype: dtype of weights and features; None keeps float32. The state and the solver's arithmetic are float32
                in any case. (`model.convert_to_fp16()` is GLIDE's own mixture.)
            tokenizer: for a state dict: a tokenizer, the folder with GPT-2's vocabulary, or a tokenizer's JSON file;
                None looks for GLIDE's (the extra `glide`). A file of `fastcfg train` has its own.
            options: for a state dict: GLIDE's options where they differ from its defaults.

        Raises:
            TypeError: no path for another pipeline than `TextToImage`.
            ValueError: not such a file, a tokenizer or options that do not go with it, a device that does not exist,
                or a dtype that is not floating.
            OSError: the file cannot be read.
        """
        where = _checked_device(device)
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"dtype: got {dtype}, expected a floating dtype")
        if path is None and cls._EMBEDDED is None:
            raise TypeError("path: got None, expected a file of weights")
        embedded = files("fastcfg") / "checkpoints" / str(cls._EMBEDDED)
        with as_file(embedded) if path is None else nullcontext(path) as file:
            pipeline = cls(*load_network(file, tokenizer, options))
        # Channels-last convolutions: 10 % less time per picture on a CPU (AVX2, embedded model, batches of 8 to 128).
        pipeline.model.to(where, dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return pipeline

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def inpaints(self) -> bool:
        """Whether the network sees the known part of a picture."""
        return isinstance(self.model, InpaintText2ImUNet | SuperResInpaintText2ImUnet)

    def report(self) -> dict[str, Any]:
        """How the last call was executed: as `Sampler.report`, with `seeds`, the seed of every picture; none where
        torch's generators drew the noise."""
        return {} if self._sampler is None else {**self._sampler.report(), "seeds": list(self._seeds)}

    def _table(
        self, solver: str, steps: int | str, schedule: str | None, eta: float | None, temperature: float = 1.0
    ) -> StepTable:
        """`solver_table`, with the starting noise multiplied by the temperature."""
        table = solver_table(solver, self.schedule, steps, schedule, eta)
        return replace(table, initial_scale=table.initial_scale * temperature)

    def _prompts(self, prompts: str | Sequence[str]) -> list[str]:
        """Prompts as a list of readable texts."""
        if not isinstance(prompts, str | Sequence):
            raise TypeError(f"prompts: got {type(prompts).__name__}, expected a string or several")
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not texts:
            raise ValueError("prompts: got none, expected at least one")
        for text in texts:
            self._tokens("prompt", text)
        return texts

    def _tokens(self, name: str, text: str) -> list[int]:
        """Ids of a text that the model can read."""
        if not isinstance(text, str):
            raise TypeError(f"{name}: got {type(text).__name__}, expected a string")
        if not text.strip():
            raise ValueError(f"{name}: got {text!r}, expected words")
        if unknown := self.tokenizer.unknown_words(text):
            vocabulary = json.loads(self.tokenizer.to_json())["model"]["vocab"]
            words = [word for word in vocabulary if not word.startswith("<|")]
            raise ValueError(f"{name}: got {_unknown_words(unknown, words)}")
        ids = self.tokenizer.encode(text)
        if len(ids) > self.model.text_ctx:
            raise ValueError(f"{name}: got {len(ids)} tokens in {text!r}, expected at most {self.model.text_ctx}")
        return ids

    @torch.no_grad()
    def _encode(self, ids: Sequence[int]) -> dict[str, Tensor]:
        """Encode one text. Never several at once: matrix products of another size may round differently."""
        padded = self.tokenizer.padded_tokens_and_mask(ids, self.model.text_ctx)
        return self.model.get_text_emb(*(torch.tensor([values], device=self.device) for values in padded))

    def _inpainting(self, inpaint: tuple[Tensor, Tensor] | None, batch: int) -> dict[str, Tensor]:
        """The network's inputs for the known pixels of N pictures."""
        if inpaint is None:
            return {}
        if not self.inpaints:
            raise ValueError(f"inpaint: got pictures for a {self.meta.network}, expected None: it cannot see them")
        image, mask = checked_inpainting(inpaint, self._channels, self.meta.image_size, batch, self.device)
        return {"inpaint_image": image * mask, "inpaint_mask": mask}

    def _check_table(self, table: StepTable, guidance: Guidance, inputs: Mapping[str, Tensor], batch: int = 1) -> None:
        """Raise ValueError for guidance, or known pixels, that do not go with a solver."""
        size = self.meta.image_size
        plan_for(guidance, table, (batch, self._channels, size, size))
        if "inpaint_mask" in inputs and (table.uses_raw_output or table.uses_unconditional or table["k_m"].any()):
            got = f"pictures with solver {table.name!r}"
            raise ValueError(f"inpaint: got {got}, expected one whose steps use x0 alone, as 'ddim'")

    def _sampler_for(self, solver: tuple[Any, ...], **options: Any) -> Sampler:
        """The sampler of the last call if its options are the same; `solver` has the arguments of `_table`."""
        given = (solver, options, self.device, self.model.dtype)
        if self._sampler is None or given != self._options:
            options = {"clip": 1.0, "memory_format": torch.channels_last, **options}
            self._sampler, self._options = Sampler(self.model, self._table(*solver), **options), given
        return self._sampler

    def _draw(self, sampler: Sampler, drawing: Drawing) -> Tensor:
        """Run a sampler over N pictures; float32 [N, C, H, W] in [-1, 1]."""
        count = len(drawing.texts)
        batch = min(drawing.batch_size, count)
        self._check_table(sampler.table, drawing.guidance, drawing.inputs, batch)
        check_functions(sampler.table, drawing.guidance, {}, denoised_fn=None, cond_fn=drawing.cond_fn)
        distinct = list(dict.fromkeys(drawing.texts))
        owners = torch.tensor([distinct.index(text) for text in drawing.texts], device=self.device)
        encoded = [self._encode(self._tokens("prompt", text)) for text in distinct]
        cond = {name: torch.cat([text[name] for text in encoded]) for name in encoded[0]}
        others = {branch: self._encode(ids) for branch, ids in drawing.others.items()}
        seeds, batch_size, size = list(drawing.seeds), drawing.batch_size, self.meta.image_size
        self._seeds = seeds
        known = self._known_pixels(batch, drawing.inputs)
        starts = range(0, count, batch_size)
        images = []
        with progress_bar(drawing.progress, total=len(starts) * sampler.table.num_rows) as bar:
            for start in starts:
                part = slice(start, start + batch_size)
                rows = owners[part]
                inputs = {name: value if len(value) == 1 else value[part] for name, value in drawing.inputs.items()}
                if known is not None:
                    known.load(inputs["inpaint_image"], inputs["inpaint_mask"], len(rows))
                given: dict[str, Any] = {"guidance": drawing.guidance, "denoised_fn": known, "cond_fn": drawing.cond_fn}
                given |= {"progress": bar if drawing.progress else False, "callback": drawing.callback}
                generator = drawing.generator
                if generator is None:
                    given["seed"] = seeds[part]
                else:
                    given["generator"] = generator[part] if isinstance(generator, Sequence) else generator
                given["cond"] = {**{name: values[rows] for name, values in cond.items()}, **inputs}
                given["branches"] = {branch: {**text, **inputs} for branch, text in others.items()}
                images.append(sampler.sample((len(rows), self._channels, size, size), **given))
                if known is not None:  # the last steps of some solvers, as lms, do not return x0 itself
                    images[-1] = known(images[-1])
        return torch.cat(images).clamp_(-1, 1)

    def _known_pixels(self, batch: int, inputs: Mapping[str, Tensor]) -> KnownPixels | None:
        """The function that puts known pixels back, if there are any: the last call's if its buffers suffice."""
        if "inpaint_mask" not in inputs:
            return None
        if self._known is None or self._known.batch < batch or self._known.device != self.device:
            self._known = KnownPixels(batch, self._channels, self.meta.image_size, self.device)
        return self._known


Stage = Pipeline  # the old name
# What a copy keeps; the rest belongs to past calls.
_KEPT = ("model", "tokenizer", "meta", "schedule", "_channels")


def _checked_device(device: torch.device | str) -> torch.device:
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device: got {device!r}, expected one like 'cpu' or 'cuda'") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: got {str(found)!r}, expected one of the {torch.cuda.device_count()} GPUs torch sees")
    return found


def _unknown_words(unknown: list[str], vocabulary: list[str]) -> str:
    """Names the words that are not in the vocabulary, with close ones that are."""
    described = []
    for word in unknown:
        close = difflib.get_close_matches(word, vocabulary)
        described.append(f"{word!r}" + (f" (did you mean {' or '.join(close)}?)" if close else ""))
    return f"words the model does not know: {', '.join(described)}; expected some of {', '.join(vocabulary)}"
