"""What a sampler keeps from call to call: memory, and the programs captured on it, as long as they are valid."""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..guidance import GuidancePlan
from .buffers import Options, Workspace
from .conditioning import Conditioning, Same
from .graphs import Pool
from .programs import Programs
from .staleness import Fingerprint, torch_settings

__all__ = ["Keeper", "Kept"]

# Shapes and option sets whose buffers and graphs are kept for the next call.
MAX_WORKSPACES = 4


@dataclass(frozen=True, eq=False)
class Kept:
    """Memory and programs of a kind of call.

    Attributes:
        key: by which the next such call finds them.
        workspace: the memory.
        programs: on it.
        pool: of their graphs.
        fingerprint: of what was captured; None if nothing was.
        generation: how often the keeper had been told to refresh.
    """

    key: Any
    workspace: Workspace
    programs: Programs
    pool: Pool
    fingerprint: Fingerprint | None
    generation: int


class Keeper:
    """The memory and programs that are not in use, those used last longest.

    Args:
        device: where they are.

    Attributes:
        captures: how often programs were made.
        recaptured: why the last time, where there had been others; empty if that never happened.
    """

    def __init__(self, device: torch.device) -> None:
        self.captures, self.recaptured = 0, ""
        self._kept: OrderedDict[Any, Kept] = OrderedDict()
        self._pool = Pool(device)
        self._generation = 0
        self._warned: set[Same] = set()
        self._lock = threading.Lock()

    def take(
        self,
        options: Options,
        model: Callable[..., Any],
        plan: GuidancePlan,
        shape: tuple[int, ...],
        conditioning: Conditioning,
        given: Conditioning,
    ) -> Kept:
        """Memory and programs for a call, which nobody else has until they are given back.

        Args:
            options: of the call.
            model: to be called, compiled if that is wanted.
            plan, shape, conditioning, given: as `Workspace`.
        """
        layout = (shape, conditioning.signature(), given.signature())
        key = (options, layout, plan.active, plan.agreement, plan.fallback_branches, torch_settings(options.device))
        with self._lock:
            kept = self._kept.pop(key, None)
        workspace = None
        if kept is not None:
            stale = self._stale(kept)
            if not stale:
                return kept
            self.recaptured, workspace = stale, kept.workspace
            del kept  # its graphs' memory serves the new ones
        workspace = workspace or Workspace(options, plan, shape, conditioning, given)
        workspace.enter_stream()
        pool, generation = self._pool, self._generation
        programs = Programs(workspace, model, pool)
        self.captures += 1
        if programs.problem and options.model not in self._warned:
            self._warned.add(options.model)
            message = f"running eagerly: the model {programs.problem}"
            warnings.warn(message, stacklevel=5)  # the caller of Sampler.sample
        captured = any(decision.graph != "none" for decision in programs.decisions.values())
        # Taken now: a model may keep tensors from its first calls.
        fingerprint = Fingerprint(_functions(options)) if captured else None
        return Kept(key, workspace, programs, pool, fingerprint, generation)

    def give_back(self, kept: Kept) -> None:
        """Keep what `take` gave for the next call like it."""
        with self._lock:
            if kept.pool is not self._pool:
                return  # released meanwhile
            self._kept[kept.key] = kept
            while len(self._kept) > MAX_WORKSPACES:
                self._kept.popitem(last=False)

    def nbytes(self) -> int:
        """Bytes of the memory that is kept and of the graphs' pool."""
        return sum(kept.workspace.nbytes() for kept in self._kept.values()) + self._pool.nbytes()

    def release(self) -> None:
        """Keep nothing, not even what is in use now."""
        with self._lock:
            self._kept.clear()
            self._pool = Pool(self._pool.device)

    def refresh(self) -> None:
        """Hold what was captured until now for invalid."""
        self._generation += 1

    def _stale(self, kept: Kept) -> str:
        """Why programs are not valid any more; empty if they are."""
        if kept.generation != self._generation:
            return "refresh() was called"
        if kept.fingerprint is None:
            return ""
        return kept.fingerprint.changes(_functions(kept.workspace.options))


def _functions(options: Options) -> dict[str, Any]:
    functions = {name: getattr(options, name).value for name in ("model", "denoised_fn", "cond_fn", "mix")}
    return functions | {f"branch_models[{name!r}]": same.value for name, same in options.branch_models}
