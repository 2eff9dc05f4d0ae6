"""All that a run carries from one row to the next: what `Sampler.export` returns, and `resume` goes on from."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ..table import StepTable
from ..utils.files import replacing

_FORMAT = "fastcfg.RunState/1"


@dataclass(frozen=True, eq=False)
class RunState:
    """A run after one of its rows. Its tensors are copies, on the run's device.

    Attributes:
        row: the next row to run.
        began: the row that the run began with, above 0 for image to image.
        table: which table it runs (`table_key`).
        x: the state [B, C, ...], in the state's dtype.
        noise: where its noise comes from: "none" (no row adds any), "recorded" (the caller gives it again), "philox",
            "torch" or "brownian".
        history: the solver's saved tensors [H, B, C, ...], or None.
        momentum: the guidance's running mean [B, C, ...], or None.
        seeds: int64 [B], of the samples, with "philox" and "brownian".
        generators: states of torch's generators, uint8 [G, bytes], with "torch": one, or one for each sample.

    Example:
        >>> from fastcfg import Sampler, Schedule, solvers
        >>> table = solvers.ddim(Schedule.named("linear").respace(10), eta=1.0)
        >>> sampler = Sampler(lambda x, t: 0.1 * x, table)
        >>> state = sampler.export((2, 3, 8, 8), stop=4, seed=0)
        >>> torch.equal(sampler.resume(state), sampler.sample((2, 3, 8, 8), seed=0))
        True
    """

    row: int
    began: int
    table: str
    x: Tensor
    noise: str
    history: Tensor | None = None
    momentum: Tensor | None = None
    seeds: Tensor | None = None
    generators: Tensor | None = None

    def __repr__(self) -> str:
        return f"RunState(row {self.row}, shape {tuple(self.x.shape)}, {self.noise} noise)"

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, C, ...) of the samples."""
        return tuple(self.x.shape)

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by attribute."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as safetensors, whole or not at all. OSError if the file cannot be written."""
        from safetensors.torch import save_file

        others = {name: str(getattr(self, name)) for name in ("row", "began", "table", "noise")}
        with replacing(path) as temporary:
            tensors = {name: value.contiguous() for name, value in self.tensors().items()}
            save_file(tensors, temporary, {"format": _FORMAT, **others})

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> RunState:
        """What `save` wrote, on a device; OSError or ValueError for another file."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt", device=str(device)) as file:
                found = file.metadata() or {}
                if found.get("format") != _FORMAT:
                    raise ValueError(f"got format {found.get('format')!r}, expected {_FORMAT!r}")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return cls(int(found["row"]), int(found["began"]), found["table"], noise=found["noise"], **tensors)
        except (ValueError, KeyError, TypeError, SafetensorError) as error:
            raise ValueError(f"{os.fspath(path)}: not a RunState of this version of fastcfg ({error})") from error


def table_key(table: StepTable) -> str:
    """Equal for tables of the same numbers, whatever their names."""
    digest = hashlib.sha256(table.rows.tobytes() + table.steps.astype("int64").tobytes())
    digest.update(repr((table.learned_variance, float(table.initial_scale), table.integer_time)).encode())
    return digest.hexdigest()
