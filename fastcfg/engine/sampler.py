"""`Sampler`: checks a call's arguments, takes programs for it from the cache, and runs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ..clip import DynamicThreshold
from ..guidance import Guidance, NoGuidance
from ..guidance.places import plan_for
from ..known_pixels import KeptImage
from ..table import StepTable
from ..utils.checks import check_count
from ..utils.identity import Alike
from .by_row import ByRow, models_of
from .call import Call, ProgramOptions, check_functions, check_places, check_shape, clip_bounds
from .call_noise import make_source
from .conditioning import Conditioning, check_conditioning
from .config import COMPILE_MODES, NO_CAPTURE, SamplerConfig
from .loop import Preview, Previews, ProgressBar, Run, RunCounts, Step
from .noise import Generators, NoiseSource, Recording
from .program_cache import ProgramCache
from .programs import Decision
from .row_plan import RowPlan, Watch, plan_rows
from .run_state import RunState
from .span import plan_span
from .state_function import StateFunction, check_row_noise, checked_state_function, draws_by_seed, plan_state
from .trajectory import States, Trajectory, check_log_prob, trajectory_of

__all__ = ["Preview", "RunState", "Sampler", "Step"]

_OPTIONS = tuple(field.name for field in fields(SamplerConfig))
_CALL = (
    "cond",
    "uncond",
    "branches",
    "guidance",
    "clip",
    "denoised_fn",
    "cond_fn",
    "state_fn",
    "seed",
    "generator",
    "noise",
    "x_T",
    "init",
    "strength",
    "start",
    "stop",
    "state",
)
_RENAMED = {"noise": "noise_source", "steps_per_graph": "rows_per_graph"}


class _Own:
    def __repr__(self) -> str:
        return "<the sampler's>"


# The default of a call's argument for which the sampler has a value of its own.
OWN: Any = _Own()


class Sampler:
    """Samples from a diffusion model with guidance, one fused step per model evaluation.

    The model is called as `model(x, t, **conditioning)` with x [K*B, C, ...] in its dtype, t [K*B], and the branches'
    conditionings concatenated along the batch in the order of the guidance spec. It returns [K*B, C, ...], or [K*B, 2C,
    ...] with variance channels (of a tuple, the first element is used). Threads may share a sampler. A copied or
    pickled one starts without buffers and graphs.

    Args:
        model: any callable; device and dtype are taken from the parameters of a `torch.nn.Module`. A `ByRow` of models
            takes another one in some rows (experts by noise level, a refiner, a network without its ControlNet): each
            is captured, and what solver and guidance keep goes from one to the next; with `table.restarted(row)` the
            solver begins again at a row.
        table: from `fastcfg.solvers` (or any `StepTable`).
        guidance: a spec of `fastcfg.guidance`; None runs one conditional branch.
        branch_models: by name, the models of branches that the model does not run (a weaker one, or the same one
            perturbed), called like the model, one after the other. Such a branch takes the conditional branch's
            conditioning unless it is given one with the same keys (as returned by the model's `precompute`, where the
            branch's model has none).
        clip: bound of x0: None, a number (1.0 for images in [-1, 1]), B numbers, or a `DynamicThreshold`. For a table
            whose rows do not use x0 (`table.uses_x0`) it limits previews, not samples.
        denoised_fn: changes x0 before the clip, [B, C, ...] to the same shape, as guided-diffusion's; inpainting puts
            the known pixels back.
        cond_fn: classifier guidance, as guided-diffusion's: (x [B, C, ...], t [B], **cond) -> ∇ log p(y | x_t), of x's
            shape. Called with gradients off: it must turn them on for itself.
        state_fn: changes the state after every row, (x, x0, row) -> x, in the captured program (`StateFunction`; with
            `when="before"`, before it); or known pixels: `fastcfg.inpaint`, `differential`, `repaint`.
        config: a `SamplerConfig`; None for its defaults.
        **options: fields of `SamplerConfig`, which replace those of `config`.

    All are attributes, the defaults of every call. They may be replaced between calls: buffers and graphs are kept
    where the new values allow it. `config` has device, dtype and backend settled; its fields are the sampler's too.

    Raises:
        TypeError, ValueError: an argument of another type, an unknown option, or a value that does not fit.

    Example:
        >>> import torch
        >>> from fastcfg import CFG, Sampler, Schedule, solvers
        >>> model = lambda x, t, y: x * y.view(-1, 1, 1, 1)
        >>> sampler = Sampler(model, solvers.ddim(Schedule.named("linear").respace(10)), guidance=CFG(3.0), clip=1.0)
        >>> images = sampler.sample((2, 3, 8, 8), cond={"y": torch.ones(2)}, uncond={"y": torch.zeros(2)}, seed=0)
        >>> images.shape
        torch.Size([2, 3, 8, 8])
    """

    model: Any

    def __init__(
        self,
        model: Callable[..., Any] | ByRow,
        table: StepTable,
        *,
        guidance: Guidance | None = None,
        branch_models: Mapping[str, Callable[..., Any]] | None = None,
        clip: float | Sequence[float] | Tensor | DynamicThreshold | None = None,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        cond_fn: Callable[..., Tensor] | None = None,
        state_fn: Callable[..., Tensor] | StateFunction | KeptImage | None = None,
        config: SamplerConfig | None = None,
        **options: Any,
    ) -> None:
        if config is not None and not isinstance(config, SamplerConfig):
            raise TypeError(f"config: got {type(config).__name__}, expected a SamplerConfig or None")
        if unknown := sorted(set(options) - set(_OPTIONS)):
            got = ", ".join(f"{name} (now {_RENAMED[name]})" if name in _RENAMED else name for name in unknown)
            raise TypeError(f"options: got {got}, expected some of {', '.join(_OPTIONS)}")
        if branch_models is not None and not isinstance(branch_models, Mapping):
            raise TypeError(f"branch_models: got {type(branch_models).__name__}, expected a mapping of names to models")
        self.model, self.table, self.guidance = model, table, _checked_guidance(guidance)
        self.branch_models, self.clip = dict(branch_models or {}), clip
        self.denoised_fn, self.cond_fn, self.state_fn = denoised_fn, cond_fn, state_fn
        self.config = replace(config or SamplerConfig(), **options)
        self._start_empty()

    def _start_empty(self) -> None:
        self._compiled: tuple[Any, tuple[Callable[..., Any], ...]] | None = None
        self._cache = ProgramCache(self.device)
        self._last: tuple[ProgramOptions, dict[Any, Decision], RunCounts] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_compiled", "_cache", "_last")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._start_empty()

    def __repr__(self) -> str:
        config, clip = self.config, self._clip
        shown = clip.tolist() if isinstance(clip, Tensor) else clip
        where = f"{config.backend} on {config.device}, graph={config.graph!r}"
        return f"Sampler({self.table.name}, {self.table.num_rows} rows, {self.guidance!r}, clip={shown}, {where})"

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _OPTIONS:
            raise AttributeError(f"{name}: got {value!r}, expected a new sampler.config: it is an option of the config")
        if name == "model":
            for model in models_of(value):
                if not callable(model):
                    raise TypeError(f"model: got {type(model).__name__}, expected a callable")
        if name == "table" and not isinstance(value, StepTable):
            raise TypeError(f"table: got {type(value).__name__}, expected a StepTable (see fastcfg.solvers)")
        super().__setattr__(name, _checked_guidance(value) if name == "guidance" else value)

    def __getattr__(self, name: str) -> Any:
        if name in _OPTIONS:
            return getattr(self.config, name)
        raise AttributeError(f"'Sampler' object has no attribute {name!r}")

    @property
    def config(self) -> SamplerConfig:
        """The options, with device, dtype and backend settled."""
        return self._config

    @config.setter
    def config(self, config: SamplerConfig) -> None:
        before: Any = vars(self).get("_config")
        if before is not None and vars(self)["_is_auto"] and config.backend == before.backend:
            # Another state's dtype, say, may need another backend.
            config = replace(config, backend="auto")
        self._is_auto = config.backend == "auto"
        self._config = config.resolved_for(models_of(self.model))

    @property
    def clip(self) -> Tensor | DynamicThreshold | None:
        """The bounds of x0, float64 [1] or [B], or dynamic thresholding."""
        return self._clip

    @clip.setter
    def clip(self, clip: float | Sequence[float] | Tensor | DynamicThreshold | None) -> None:
        self._clip = clip_bounds(clip)

    @overload
    def sample(self, shape: Sequence[int], *, log_prob: Literal[True], **arguments: Any) -> Trajectory: ...

    @overload
    def sample(self, shape: Sequence[int], *, trajectory: Literal[True], **arguments: Any) -> Trajectory: ...

    @overload
    def sample(
        self, shape: Sequence[int], *, log_prob: Literal[False] = False, trajectory: Literal[False] = False, **a: Any
    ) -> Tensor: ...

    def sample(  # type: ignore[misc]  # mypy wants **arguments: the overloads spare a list of arguments each
        self,
        shape: Sequence[int],
        *,
        cond: Mapping[str, Any] | ByRow | None = None,
        uncond: Mapping[str, Any] | ByRow | None = None,
        branches: Mapping[str, Mapping[str, Any] | ByRow] | None = None,
        guidance: Guidance | None = OWN,
        clip: float | Sequence[float] | Tensor | DynamicThreshold | None = OWN,
        denoised_fn: Callable[[Tensor], Tensor] | None = OWN,
        cond_fn: Callable[..., Tensor] | None = OWN,
        state_fn: Callable[..., Tensor] | StateFunction | KeptImage | None = OWN,
        seed: int | Sequence[int] | None = None,
        generator: Generators | None = None,
        noise: Recording | NoiseSource | None = None,
        x_T: Tensor | None = None,
        init: Tensor | None = None,
        strength: float | None = None,
        start: int | None = None,
        stop: int | None = None,
        state: RunState | None = None,
        progress: bool | Any = False,
        callback: Callable[[Step], object] | None = None,
        preview: Callable[[Preview], object] | None = None,
        preview_every: int = 1,
        log_prob: bool = False,
        trajectory: bool = False,
    ) -> Tensor | Trajectory:
        """Run all rows, or those from `start` to `stop`.

        Args:
            shape: (B, C, ...) of the samples.
            cond, uncond: keyword arguments of the model for these branches, with the same keys: tensors [B, ...] (or
                [1, ...], repeated), dicts, lists and tuples of them, 0-d tensors, or values that all branches share.
                Branches with tensors of other sizes run one after the other (or see `Padded`). A `ByRow` of
                conditionings, or in the place of an argument, changes with the row. A negative prompt goes to uncond.
            branches: conditionings of further branches by name, for guidance that has them.
            guidance, clip, denoised_fn, cond_fn, state_fn: for this call, in place of the sampler's own.
            seed: of 64 bits. Sample i gets `seed + i`; a sequence gives each its own. With noise_source="torch" one
                integer seeds the whole batch. None takes a seed from `generator`.
            generator: torch's, in place of its global one: of the seed with noise_source="philox", of all draws with
                "torch" (then it must be on the sampler's device). A list has one for each sample, which then has the
                noise that it has alone, as in diffusers.
            noise: recorded standard normals, [R, B, C, ...] or a function (row, shape) -> tensor, or a `NoiseSource`.
            x_T: the state to start from [B, C, ...], in place of initial_scale times noise.
            init: an image [B, C, ...] to start from: noise is added to it as the first row has it (image to image).
            strength: with init, the share of the steps that are run, the last ones, as in diffusers' pipelines.
            start: the first row to run, with init or x_T. A multistep solver then begins with lower orders, as at row
                0, and rows keep their times, noise and guidance. Within a step of several rows nothing can start.
            stop: the row before which to stop; the result is the state there.
            state: a `RunState` to go on from, which has start, state and noise of its run (see `export`).
            progress: True shows a progress bar; a tqdm bar is updated. On a GPU the host then stays one row ahead.
            callback: called with a `Step` after every row, when it is enqueued. It costs two copies of the state per
                row on the device, and no sync. What it writes to the given conditionings (tensors in place, items of
                the dicts) counts from the next row on, and costs a copy.
            preview: called with a `Preview` one row after it was computed: the device has work while the host waits for
                the copy. The last row's comes at the end.
            preview_every: preview every n-th row only (and the last).
            log_prob: return a `Trajectory`, with every draw's log-probability: one more pass, which reads no state.
            trajectory: return a `Trajectory`, with the states: one copy of the state per row on the device.

        Returns:
            The samples, [B, C, ...] in the state's dtype: the caller's own tensor; or a `Trajectory`.

        Raises:
            TypeError, ValueError: arguments that do not fit, before any work.
        """
        preview_every = check_count("preview_every", preview_every)
        for name, observer in (("callback", callback), ("preview", preview)):
            if observer is not None and not callable(observer):
                raise TypeError(f"{name}: got {type(observer).__name__}, expected a function or None")
        progress = progress if hasattr(progress, "update") else bool(progress)
        keep_x0 = callback is not None or preview is not None
        run = self._prepare(
            shape, keep_x0, cond, uncond, branches, guidance, clip, denoised_fn, cond_fn, state_fn, seed, generator,
            noise, x_T, init, strength, start, stop, state, log_prob=bool(log_prob), by_row=bool(trajectory),
            watched=callback is not None,
        )  # fmt: skip
        rows = run.span.rows
        states = States(run, rows) if trajectory else None
        previews = None if preview is None else Previews(run, preview, preview_every)
        with ProgressBar(progress, run.span.rows, self.device) as bar:
            for row in run.rows():
                if states is not None:
                    states.after_row(row)
                if callback is not None:
                    callback(run.step(row))
                if previews is not None:
                    previews.after_row(row)
                if progress is not False:
                    bar.after_row(row)
        if previews is not None:
            previews.deliver()
        return trajectory_of(run, rows, states) if log_prob or trajectory else run.result

    def iterate(self, shape: Sequence[int], **arguments: Any) -> Iterator[Step]:
        """`sample` as a generator: yields a `Step` after every row; the last one's x are the samples. It takes the
        keyword arguments of `sample` up to `state`, and checks them at once. Conditionings may change, as in a
        callback."""
        _check_names("iterate", arguments)
        run = self.start(shape, **arguments)
        return (run.step(row) for row in run.rows())

    def start(self, shape: Sequence[int], **arguments: Any) -> Run:
        """A run that `iterate` makes, before its first row, for loops that change the state between rows."""
        return self._prepare(shape, True, **arguments)

    @torch.no_grad()
    def export(self, shape: Sequence[int], *, stop: int, **arguments: Any) -> RunState:
        """Run the rows before `stop`, and return what `resume` goes on from, here or in another process: the state, and
        what solver, guidance and noise carry from row to row. It takes the keyword arguments of `sample` up to `state`.

        Both parts together have the bits of one run, with the same arguments of `sample` in each but seed and generator
        (recorded noise is given again, whole); a part may have another model, guidance or clip. One that adaptive
        guidance runs cannot be exported: ValueError.
        """
        _check_names("export", arguments)
        run = self._prepare(shape, stop=stop, export=True, **arguments)
        for _ in run.rows(export=True):
            pass
        return run.state

    def resume(self, state: RunState, **arguments: Any) -> Tensor:
        """The rest of an exported run: `sample` of its shape, with `state` and the other keyword arguments."""
        if not isinstance(state, RunState):
            raise TypeError(f"state: got {type(state).__name__}, expected a RunState (see Sampler.export)")
        return self.sample(state.shape, state=state, **arguments)

    def report(self) -> dict[str, Any]:
        """How the last run was executed: backend; graph ("cuda", "stand-in" or "none") and graph_reason (why there is
        none, or none in part); rows; branches, the number that each row evaluated; conditioning_copies, the rows before
        which other conditionings were copied; programs, a `Decision` as a dictionary for every set of branches, model
        and layout of the conditionings; copies, those of the size of the state before every row (what functions of a
        state_fn draw); captures, how often this sampler has prepared programs; and recaptured, why it last did so
        again, where something captured was no longer valid."""
        if self._last is None:
            return {}
        options, by_branches, run = self._last
        decisions = list(by_branches.values())
        return {
            "backend": options.config.backend,
            "graph": min({decision.graph for decision in decisions} - {"none"}, default="none"),
            "graph_reason": next((decision.reason for decision in decisions if decision.reason), ""),
            "rows": len(run.branches),
            "branches": list(run.branches),
            "conditioning_copies": list(run.copies),
            "programs": [asdict(decision) for decision in decisions],
            "copies": 0 if options.change is None else options.change.copies,
            "captures": self._cache.captures,
            "recaptured": self._cache.recaptured,
        }

    def memory(self) -> int:
        """Bytes held by the sampler: its static buffers, and on CUDA the pool of its graphs."""
        return self._cache.nbytes()

    def release(self) -> None:
        """Free all buffers and graphs; the next call builds them again."""
        self._cache.release()

    def refresh(self) -> None:
        """Capture again at the next call. Graphs read weights that were changed in place, and replaced weights are
        noticed: only a model whose own Python values decide which operations it runs needs this."""
        self._cache.refresh()

    @torch.no_grad()
    def _prepare(  # type: ignore[no-untyped-def]
        self, shape, keep_x0=False, cond=None, uncond=None, branches=None, guidance=OWN, clip=OWN, denoised_fn=OWN,
        cond_fn=OWN, state_fn=OWN, seed=None, generator=None, noise=None, x_T=None, init=None, strength=None,
        start=None, stop=None, state=None, export=False, log_prob=False, by_row=False, watched=True,
    ) -> Run:  # fmt: skip
        """Check everything, then set the buffers to the start of a run."""
        config = self.config
        guidance = self.guidance if guidance is OWN else _checked_guidance(guidance)
        clip = self._clip if clip is OWN else clip_bounds(clip)
        shape = check_shape(shape, config.memory_format, clip)
        rows = {"start": start, "stop": stop, "strength": strength, "init": init, "x_T": x_T, "state": state}
        span = plan_span(self.table, shape, **rows)
        table = span.table
        denoised_fn = self.denoised_fn if denoised_fn is OWN else denoised_fn
        cond_fn = self.cond_fn if cond_fn is OWN else cond_fn
        check_functions(table, guidance, self.branch_models, denoised_fn=denoised_fn, cond_fn=cond_fn)
        if branches is not None and not isinstance(branches, Mapping):
            raise TypeError(f"branches: got {type(branches).__name__}, expected a mapping of names to conditionings")
        given = ({"cond": cond, "uncond": uncond}, branches or {})
        again = partial(self._row_plan, given, guidance, shape[0], table, cond_fn is not None)
        row_plan = again()
        plan = plan_for(guidance, table, shape)
        check_places(plan, clip)
        if export and plan.agreement is not None:
            raise ValueError("export: got adaptive guidance, expected another: which samples agree is not exported")
        state_fn = self.state_fn if state_fn is OWN else state_fn
        if log_prob:
            check_log_prob(table, state_fn)
        change = None if state_fn is None else checked_state_function(state_fn, table, shape, state is not None)
        source = make_source(config, span, shape, noise, seed, generator, draws_by_seed(change))
        check_row_noise(change, table, source.kind)
        noise_source = "none" if not table.uses_noise else "tensor" if source.fill else "philox"
        changes = None if change is None else plan_state(change, noise_source, source.seeds)
        watch = Watch(given) if keep_x0 and watched else None  # what a caller changes where it sees rows
        # Where every row is looked at, every row is a program of its own.
        by_row = (
            by_row
            or keep_x0
            or plan.agreement is not None
            or config.capture in NO_CAPTURE
            or (changes is not None and bool(changes.draws))
        )
        keep_x0 = keep_x0 or (changes is not None and changes.known is None)
        options = ProgramOptions(
            config=config,
            table=table,
            models=tuple(map(Alike, models_of(self.model))),
            denoised_fn=Alike(denoised_fn),
            cond_fn=Alike(cond_fn),
            branch_models=tuple((name, Alike(model)) for name, model in sorted(self.branch_models.items())),
            branches=guidance.branches,
            base=guidance.base,
            conditional=guidance.conditional,
            unconditional=guidance.unconditional,
            mix=Alike(plan.mix),
            rescale=plan.rescale,
            momentum=plan.momentum,
            weights_by="sample" if plan.places is None else plan.places.by,
            clip=isinstance(clip, Tensor),
            threshold=clip if isinstance(clip, DynamicThreshold) else None,
            noise_source=noise_source,
            keep_x0=keep_x0,
            rows_per_graph=1 if by_row else min(config.rows_per_graph, table.num_rows),
            change=None if changes is None else changes.options,
            log_prob=log_prob,
        )
        bounds = clip if isinstance(clip, Tensor) else None
        models = self._callables()
        call = Call(options, models, shape, plan, row_plan, bounds, source, span, changes, again, watch)
        entry = self._cache.take(call)
        run = Run(entry, call)
        self._last = options, entry.programs.decisions, run.counts
        return run

    def _row_plan(
        self,
        named: tuple[Mapping[str, Any], Mapping[str, Any]],
        guidance: Guidance,
        batch: int,
        table: StepTable,
        classified: bool,
    ) -> RowPlan:
        """The models and conditionings of the rows. With what the caller gave, for cond_fn, goes what the model takes:
        encoded text, and its keys and values, are computed once."""
        given = {**named[0], **named[1]}
        given |= {name: given["cond"] for name in self.branch_models if given.get(name) is None}
        models, device, branches = models_of(self.model), self.config.device, guidance.branches

        def read(number: int, row: dict[str, Any]) -> tuple[Conditioning, Conditioning]:
            checked = check_conditioning(branches, row, batch, device)  # type: ignore[arg-type]
            model = models[number]
            if not hasattr(model, "precompute"):
                return checked, checked
            for name, value in row.items():
                if value is not None:
                    row[name] = getattr(self.branch_models.get(name), "precompute", model.precompute)(**value)
            return checked, check_conditioning(branches, row, batch, device)  # type: ignore[arg-type]

        by_model = any(hasattr(model, "precompute") for model in models)
        return plan_rows(self.model, given, table, read, by_model, guidance.conditional if classified else None)

    def _callables(self) -> tuple[Callable[..., Any], ...]:
        """The models, compiled if that is wanted."""
        models = models_of(self.model)
        if (mode := self.config.compile) is None:
            return models
        wanted = (tuple(map(Alike, models)), mode)
        if self._compiled is None or self._compiled[0] != wanted:
            compiled = (torch.compile(model, mode=COMPILE_MODES[mode], dynamic=False) for model in models)
            self._compiled = (wanted, tuple(compiled))
        return self._compiled[1]


def _check_names(method: str, arguments: dict[str, Any]) -> None:
    if unknown := sorted(set(arguments) - set(_CALL)):
        raise TypeError(f"{method}: got {', '.join(unknown)}, expected some of {', '.join(_CALL)}")


def _checked_guidance(guidance: Guidance | None) -> Guidance:
    if guidance is not None and not isinstance(guidance, Guidance):
        raise TypeError(f"guidance: got {type(guidance).__name__}, expected a Guidance such as CFG(3.0), or None")
    return guidance or NoGuidance()
