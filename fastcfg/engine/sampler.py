"""The sampler: checks a call's arguments, keeps memory and programs from call to call, and runs them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ..clip import DynamicThreshold
from ..guidance import Guidance, GuidancePlan, NoGuidance
from ..ops import resolve_backend
from ..ops.backend import inductor_problem
from ..table import StepTable
from .buffers import NO_CAPTURE, Options
from .conditioning import Alike, check_conditioning
from .loop import Preview, Previews, ProgressBar, Run, Step
from .noise import NoiseSource, Recording, philox_source, recorded_source, torch_source
from .program_cache import Keeper, Kept
from .programs import Decision

__all__ = ["Preview", "Sampler", "Step"]

BATCHINGS = ("auto", "batched", "serial")
# Names of torch.compile's modes. Graphs are the engine's to capture.
COMPILE_MODES = {"default": "default", "max-autotune": "max-autotune-no-cudagraphs"}


class Sampler:
    """Samples from a diffusion model with guidance, one fused step per model evaluation.

    The model is called as `model(x, t, **conditioning)` with x [K*B, C, ...] in its dtype, t [K*B], and the branches'
    conditionings concatenated along the batch in the order of the guidance spec. It returns [K*B, C, ...], or [K*B, 2C,
    ...] with variance channels (a tuple's first element is taken).

    Args:
        model: any callable; a `torch.nn.Module` tells its device and dtype.
        table: from `fastcfg.solvers` (or any `StepTable`).
        guidance: a spec of `fastcfg.guidance`; None runs one conditional branch.
        branch_models: by name, the models of branches that the model does not run: a weaker one, or the same one
            perturbed; any callables called like the model, serially after it. Their branches take the conditional
            branch's conditioning unless they are given one of the same keys (of the model's `precompute`, where they
            have none).
        clip: bound of x0: None for none, a number (1.0 for images in [-1, 1]), B numbers, or a `DynamicThreshold`. Of a
            table whose rows do not use x0 (`table.uses_x0`) it limits what previews show, not the samples.
        denoised_fn: changes x0 before the clip: x0 [B, C, ...] -> the same shape (guided-diffusion's argument of that
            name; inpainting puts the known pixels back).
        cond_fn: classifier guidance: (x [B, C, ...], t [B], **cond) -> ∇ log p(y | x_t), of x's shape
            (guided-diffusion's argument of the same name). Called without gradients: it turns them on for itself.
        noise: where the steps' noise comes from unless `sample` is given some: "philox" (drawn in the step; image i
            depends on its seed alone) or "torch" (`torch.randn`, from the global generator where no seed is given).
        backend: "auto", "triton", "inductor" (compiles for seconds, see `GuidedStep`) or "reference".
        graph: "auto" captures model and step as one CUDA graph where that is measured to be faster, and runs eagerly
            elsewhere; True captures without measuring (on a CPU, with the stand-in for graphs); False runs eagerly. A
            model that cannot be captured runs eagerly, with a warning that names the line to blame.
        batching: "batched" runs one forward for all branches, "serial" one for each; "auto" takes the faster one where
            graphs are measured, and else the first. They may differ in the last bits.
        steps_per_graph: rows in one graph, where nobody looks on (callback, preview, adaptive guidance).
        compile: "default" or "max-autotune" has torch.compile compile the model, without graphs of its own.
        dtype: the model input's dtype; by default that of the model's first floating parameter, else float32.
        state_dtype: torch.float32, or torch.float64 on the reference path.
        device: by default that of the model's first parameter, else the CPU.
        memory_format: torch.contiguous_format or torch.channels_last, for the model input.

    Attributes:
        table, guidance, branch_models, clip, denoised_fn, cond_fn: as given. They may be replaced between calls;
            buffers and graphs are kept where the new values allow it.

    Raises:
        TypeError: model not callable, table not a StepTable, guidance not a Guidance, clip not numbers.
        ValueError: any other bad argument, with what was expected.

    Example:
        >>> import torch
        >>> from fastcfg import CFG, Sampler, Schedule, solvers
        >>> model = lambda x, t, y: x * y.view(-1, 1, 1, 1)
        >>> sampler = Sampler(model, solvers.ddim(Schedule.named("linear").respace(10)), guidance=CFG(3.0), clip=1.0)
        >>> images = sampler.sample((2, 3, 8, 8), cond={"y": torch.ones(2)}, uncond={"y": torch.zeros(2)}, seed=0)
        >>> images.shape
        torch.Size([2, 3, 8, 8])
    """

    def __init__(
        self,
        model: Callable[..., Any],
        table: StepTable,
        *,
        guidance: Guidance | None = None,
        branch_models: Mapping[str, Callable[..., Any]] | None = None,
        clip: float | Sequence[float] | Tensor | DynamicThreshold | None = None,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        cond_fn: Callable[..., Tensor] | None = None,
        noise: str = "philox",
        backend: str = "auto",
        graph: str | bool = "auto",
        batching: str = "auto",
        steps_per_graph: int = 1,
        compile: str | None = None,
        dtype: torch.dtype | None = None,
        state_dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        if not callable(model):
            raise TypeError(f"model: got {type(model).__name__}, expected a callable")
        if not isinstance(table, StepTable):
            raise TypeError(f"table: got {type(table).__name__}, expected a StepTable (see fastcfg.solvers)")
        if guidance is not None and not isinstance(guidance, Guidance):
            raise TypeError(f"guidance: got {type(guidance).__name__}, expected a Guidance such as CFG(3.0), or None")
        if noise not in ("philox", "torch"):
            raise ValueError(f"noise: got {noise!r}, expected 'philox' or 'torch'")
        if graph not in ("auto", True, False):
            raise ValueError(f"graph: got {graph!r}, expected 'auto', True or False")
        if batching not in BATCHINGS:
            raise ValueError(f"batching: got {batching!r}, expected one of {', '.join(BATCHINGS)}")
        if not isinstance(steps_per_graph, int) or steps_per_graph < 1:
            raise ValueError(f"steps_per_graph: got {steps_per_graph!r}, expected an integer of at least 1")
        if compile is not None and compile not in COMPILE_MODES:
            raise ValueError(f"compile: got {compile!r}, expected None or one of {', '.join(COMPILE_MODES)}")
        if state_dtype not in (torch.float32, torch.float64):
            raise ValueError(f"state_dtype: got {state_dtype}, expected torch.float32 or torch.float64")
        if memory_format not in (torch.contiguous_format, torch.channels_last):
            raise ValueError(
                f"memory_format: got {memory_format}, expected torch.contiguous_format or torch.channels_last"
            )
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"dtype: got {dtype}, expected a floating dtype")
        parameter = _first_parameter(model)
        self.model, self.table = model, table
        self.guidance = guidance or NoGuidance()
        self.branch_models = dict(branch_models or {})
        self.clip = clip
        self.denoised_fn, self.cond_fn = denoised_fn, cond_fn
        self.noise = noise
        self.device = _with_index(device or (parameter.device if parameter is not None else "cpu"))
        self.dtype = dtype or (parameter.dtype if parameter is not None else torch.float32)
        self.state_dtype = state_dtype
        self.backend = resolve_backend(backend, self.device, state_dtype)
        self.memory_format = memory_format
        self.graph, self.batching, self.steps_per_graph, self.compile = graph, batching, steps_per_graph, compile
        if compile is not None and (problem := inductor_problem(self.device)):
            raise ValueError(f"compile: {compile!r} cannot run here: {problem}")
        self._compiled: tuple[Any, Callable[..., Any]] | None = None
        self._keeper = Keeper(self.device)
        self._last: tuple[Options, list[Decision], list[int]] | None = None

    @property
    def clip(self) -> Tensor | DynamicThreshold | None:
        """The bounds of x0, float64 [1] or [B], or where they come from."""
        return self._clip

    @clip.setter
    def clip(self, clip: float | Sequence[float] | Tensor | DynamicThreshold | None) -> None:
        self._clip = clip if clip is None or isinstance(clip, DynamicThreshold) else _bounds(clip)

    def sample(
        self,
        shape: Sequence[int],
        *,
        cond: Mapping[str, Any] | None = None,
        uncond: Mapping[str, Any] | None = None,
        branches: Mapping[str, Mapping[str, Any]] | None = None,
        seed: int | Sequence[int] | None = None,
        noise: Recording | NoiseSource | None = None,
        x_T: Tensor | None = None,
        progress: bool | Any = False,
        callback: Callable[[Step], object] | None = None,
        preview: Callable[[Preview], object] | None = None,
        preview_every: int = 1,
    ) -> Tensor:
        """Run all rows.

        Args:
            shape: (B, C, ...) of the samples.
            cond: keyword arguments of the model for the conditional branch: tensors [B, ...] (or [1, ...], repeated),
                or values that all branches share.
            uncond: the same for the unconditional branch, the same keys; a negative prompt goes here.
            branches: conditionings of further branches by name, for guidance that has them.
            seed: sample i gets `seed + i`; a sequence gives each its own. With noise "torch" one integer seeds the
                whole batch. None takes a seed from torch's global generator.
            noise: recorded standard normals, [R, B, C, ...] or a function (row, shape) -> tensor, or a `NoiseSource`,
                instead of the sampler's source.
            x_T: the start [B, C, ...], instead of initial_scale times noise.
            progress: True shows a progress bar; a bar of tqdm's is updated. On a GPU the host then stays one row ahead.
            callback: called with a `Step` after every row, when it is enqueued. It costs two copies of the state per
                row on the device, and no sync.
            preview: called with a `Preview`, x0 in the host's memory, one row after it was computed: the device has
                work while the host waits for the copy. The last row's comes at the end.
            preview_every: preview every n-th row only (and the last).

        Returns:
            The samples, [B, C, ...] in the state's dtype: the caller's own tensor.

        Raises:
            ValueError: shapes, dtypes, devices, keys or lengths that do not fit, before any work.
        """
        if not isinstance(preview_every, int) or preview_every < 1:
            raise ValueError(f"preview_every: got {preview_every!r}, expected an integer of at least 1")
        progress = progress if hasattr(progress, "update") else bool(progress)
        keep_x0 = callback is not None or preview is not None
        run = self._prepare(shape, cond, uncond, branches, seed, noise, x_T, keep_x0)
        previews = None if preview is None else Previews(run, preview, preview_every)
        with ProgressBar(run, progress) as bar:
            for row in run.rows():
                if callback is not None:
                    callback(run.step(row))
                if previews is not None:
                    previews.after_row(row)
                if progress is not False:
                    bar.after_row(row)
        if previews is not None:
            previews.deliver()
        return run.result

    def iterate(
        self,
        shape: Sequence[int],
        *,
        cond: Mapping[str, Any] | None = None,
        uncond: Mapping[str, Any] | None = None,
        branches: Mapping[str, Mapping[str, Any]] | None = None,
        seed: int | Sequence[int] | None = None,
        noise: Recording | NoiseSource | None = None,
        x_T: Tensor | None = None,
    ) -> Iterator[Step]:
        """`sample` as a generator: yields a `Step` after every row; arguments as there. The last one's x are the
        samples."""
        run = self._prepare(shape, cond, uncond, branches, seed, noise, x_T, keep_x0=True)
        return (run.step(row) for row in run.rows())

    def report(self) -> dict[str, Any]:
        """How the last run was executed.

        Returns:
            backend; graph ("cuda", "stand-in" or "none") and graph_reason (why there is none, or none in part); rows;
            branches, the number that each row evaluated; programs, a `Decision` as a dictionary for every set of
            branches, with the measured times that it rests on; captures, how often this sampler has prepared programs;
            and recaptured, why the last time, where something captured was no longer valid.
        """
        if self._last is None:
            return {}
        options, decisions, branches = self._last
        graphs = sorted({decision.graph for decision in decisions} - {"none"})
        reasons = [decision.reason for decision in decisions if decision.reason]
        return {
            "backend": options.backend,
            "graph": graphs[0] if graphs else "none",
            "graph_reason": reasons[0] if reasons else "",
            "rows": len(branches),
            "branches": list(branches),
            "programs": [asdict(decision) for decision in decisions],
            "captures": self._keeper.captures,
            "recaptured": self._keeper.recaptured,
        }

    def memory(self) -> int:
        """Bytes held by the sampler: its static buffers, and on CUDA the pool of its graphs."""
        return self._keeper.nbytes()

    def release(self) -> None:
        """Give all buffers and graphs back; the next call builds them anew."""
        self._keeper.release()

    def refresh(self) -> None:
        """Capture anew at the next call.

        Weights changed in place are read by the graphs as they are, and replaced ones are noticed. Only what a graph
        cannot see needs this: a model that decides by Python values of its own which operations it runs.
        """
        self._keeper.refresh()

    @torch.no_grad()
    def _prepare(self, shape, cond, uncond, branches, seed, noise, x_T, keep_x0) -> Run:  # type: ignore[no-untyped-def]
        """Check everything, then set the buffers to the start of a run."""
        shape = _checked_shape(shape)
        batch = shape[0]
        self._check_functions()
        named = {"cond": cond, "uncond": uncond, **(branches or {})}
        named |= {name: named["cond"] for name in self.branch_models if named.get(name) is None}
        given = conditioning = check_conditioning(self.guidance.branches, named, batch, self.device)
        if hasattr(self.model, "precompute"):
            # What does not depend on t is computed once: encoded text, and its keys and values.
            named = {name: self._precompute(name)(**value) for name, value in named.items() if value is not None}
            conditioning = check_conditioning(self.guidance.branches, named, batch, self.device)
        plan = self.guidance.plan(self.table, batch)
        bounds = self.clip if isinstance(self.clip, Tensor) else None
        if bounds is not None and len(bounds) not in (1, batch):
            raise ValueError(f"clip: got {len(bounds)} bounds, expected 1 or one per sample ({batch})")
        if isinstance(self.clip, DynamicThreshold):
            self.clip.place(math.prod(shape[1:]))
        if x_T is not None and not isinstance(x_T, Tensor):
            raise TypeError(f"x_T: got {type(x_T).__name__}, expected a tensor")
        if x_T is not None and tuple(x_T.shape) != shape:
            raise ValueError(f"x_T: got shape {tuple(x_T.shape)}, expected {shape}")
        if self.memory_format == torch.channels_last and len(shape) != 4:
            raise ValueError(f"memory_format: got torch.channels_last with shape {shape}, expected (B, C, H, W)")
        source = self._source(noise, seed, shape, x_T)
        options = self._options(source, plan, keep_x0)
        kept = self._keeper.take(options, self._callable(), plan, shape, conditioning, given)
        workspace = kept.workspace
        workspace.enter_stream()
        workspace.load(conditioning, plan, bounds, given)
        buffers = workspace.buffers
        if source.seeds is not None:
            buffers.seeds.copy_(source.seeds)  # type: ignore[union-attr]
        buffers.x.copy_(source.start() * self.table.initial_scale if x_T is None else x_T)
        workspace.begin()
        return Run(workspace, kept.programs, plan, self.table, source, lambda run: self._finished(kept, run))

    def _finished(self, kept: Kept, run: Run) -> None:
        self._last = (kept.workspace.options, list(kept.programs.decisions.values()), run.branches)
        self._keeper.give_back(kept)

    def _precompute(self, branch: str) -> Callable[..., Any]:
        model: Any = self.model
        return getattr(self.branch_models.get(branch), "precompute", model.precompute)

    def _options(self, source: NoiseSource, plan: GuidancePlan, keep_x0: bool) -> Options:
        guidance, by_row = self.guidance, keep_x0 or plan.agreement is not None
        capture = "timed" if times_graphs(self.device) else "never"
        if self.graph != "auto":
            capture = "always" if self.graph else "off"
        return Options(
            model=Alike(self.model),
            denoised_fn=Alike(self.denoised_fn),
            cond_fn=Alike(self.cond_fn),
            branch_models=tuple((name, Alike(model)) for name, model in sorted(self.branch_models.items())),
            table=self.table,
            branches=guidance.branches,
            base=guidance.base,
            conditional=guidance.conditional,
            unconditional=guidance.unconditional,
            mix=Alike(plan.mix),
            rescale=plan.rescale,
            momentum=plan.momentum,
            clip=isinstance(self.clip, Tensor),
            threshold=self.clip if isinstance(self.clip, DynamicThreshold) else None,
            noise="none" if not self.table.uses_noise else "tensor" if source.fill else "philox",
            keep_x0=keep_x0,
            backend=self.backend,
            dtype=self.dtype,
            state_dtype=self.state_dtype,
            device=self.device,
            memory_format=self.memory_format,
            compile=self.compile,
            batching=self.batching,
            capture=capture,
            # Where somebody looks on, every row is a program of its own.
            repeat=1 if by_row or capture in NO_CAPTURE else min(self.steps_per_graph, self.table.num_rows),
        )

    def _callable(self) -> Callable[..., Any]:
        """The model, compiled if that is wanted."""
        if self.compile is None:
            return self.model
        wanted = (Alike(self.model), self.compile)
        if self._compiled is None or self._compiled[0] != wanted:
            self._compiled = (wanted, torch.compile(self.model, mode=COMPILE_MODES[self.compile], dynamic=False))
        return self._compiled[1]

    def _source(
        self,
        noise: Recording | NoiseSource | None,
        seed: int | Sequence[int] | None,
        shape: tuple[int, ...],
        x_T: Tensor | None,
    ) -> NoiseSource:
        if isinstance(noise, NoiseSource):
            return noise
        if x_T is not None and (noise is not None or not self.table.uses_noise):
            # Nothing is random: torch's generator must not move for a seed that nobody uses.
            source = NoiseSource(lambda: x_T)
        elif self.noise == "torch":
            source = torch_source(seed, shape, self.device)
        else:
            source = philox_source(seed, shape, self.device, self.backend)
        return source if noise is None else recorded_source(noise, self.table.num_rows, shape, source.start)

    def _check_functions(self) -> None:
        table = self.table
        for name in ("denoised_fn", "cond_fn"):
            function = getattr(self, name)
            if function is not None and not callable(function):
                raise TypeError(f"{name}: got {type(function).__name__}, expected a function or None")
        for name, model in self.branch_models.items():
            if name not in self.guidance.branches:
                expected = ", ".join(self.guidance.branches)
                raise ValueError(f"branch_models: got {name!r}, expected branches of the guidance: {expected}")
            if not callable(model):
                raise TypeError(f"branch_models[{name!r}]: got {type(model).__name__}, expected a callable")
        if self.denoised_fn is not None and (table.uses_raw_output or table.uses_unconditional or table["k_m"].any()):
            raise ValueError(
                f"denoised_fn: got a function with the table {table.name}, "
                "expected None: its rows use the model's output beside x0"
            )
        if self.cond_fn is not None and not table.uses_gradient:
            raise ValueError(
                f"cond_fn: got a function with the table {table.name}, "
                "expected None: its rows have no place for a gradient (p_g, a_g)"
            )


def times_graphs(device: torch.device) -> bool:
    """Whether graphs are measured against eager runs on a device unless somebody says otherwise."""
    return device.type == "cuda"


def _first_parameter(model: Any) -> Tensor | None:
    parameters = model.parameters() if isinstance(model, torch.nn.Module) else ()
    return next((p for p in parameters if p.is_floating_point()), None)


def _with_index(device: torch.device | str) -> torch.device:
    """ "cuda" as "cuda:0": tensors name their device with its index."""
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device: got {device!r}, expected one like 'cpu' or 'cuda'") from error
    return torch.device("cuda", torch.cuda.current_device()) if place == torch.device("cuda") else place


def _checked_shape(shape: Sequence[int]) -> tuple[int, ...]:
    if not isinstance(shape, Sequence) or len(shape) < 3 or not all(isinstance(n, int) and n > 0 for n in shape):
        raise ValueError(f"shape: got {shape}, expected (B, C, ...) of positive integers")
    return tuple(shape)


def _bounds(clip: float | Sequence[float] | Tensor) -> Tensor:
    try:
        bounds = torch.as_tensor(clip, dtype=torch.float64).detach().flatten().clone()
    except TypeError as error:
        raise TypeError(f"clip: got {clip!r}, expected None, numbers or a DynamicThreshold") from error
    if not bounds.numel() or not torch.isfinite(bounds).all() or (bounds <= 0).any():
        raise ValueError(f"clip: got {clip!r}, expected None or positive finite bounds")
    return bounds
