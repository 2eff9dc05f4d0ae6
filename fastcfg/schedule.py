"""Noise schedules of discrete-time Gaussian diffusion, in float64 numpy.

A `Schedule` has the betas of the (possibly re-spaced) process, and derives from them the arrays that solvers need under
guided-diffusion's names. Nothing here touches torch: a solver turns these arrays into a table once, on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from operator import index

import numpy as np
from numpy.typing import NDArray

from .utils.checks import as_integer, check_count, plain, takes_numbers

__all__ = ["Schedule", "betas_for_alpha_bar", "consistency_timesteps", "legacy_betas", "named_betas", "space_timesteps"]

Array = NDArray[np.float64]

BETA_SCHEDULES = ("linear", "cosine", "squaredcos_cap_v2", "scaled_linear")
LEGACY_BETA_SCHEDULES = ("quad", "linear", "warmup10", "warmup50", "const", "jsd")


@takes_numbers
def betas_for_alpha_bar(num_timesteps: int, alpha_bar: Callable[[float], float], max_beta: float = 0.999) -> Array:
    """Discretise a continuous cumulative product of (1 - beta), a function of t in [0, 1].

    Returns:
        float64 [T], T at least 1: `min(1 - alpha_bar((i + 1) / T) / alpha_bar(i / T), max_beta)`, where `max_beta` is
        below 1 so that the last step stays invertible.
    """
    check_count("num_timesteps", num_timesteps)
    edges = [alpha_bar(i / num_timesteps) for i in range(num_timesteps + 1)]
    return np.array([min(1 - b / a, max_beta) for a, b in pairwise(edges)], dtype=np.float64)


@takes_numbers
def named_betas(name: str, num_timesteps: int) -> Array:
    """Betas float64 [T] by the field's names: "linear" (Ho et al. 2020, scaled so that any T covers the range of
    T = 1000), "cosine" or "squaredcos_cap_v2" (the same function, Nichol & Dhariwal 2021, as guided-diffusion and GLIDE
    call it), "scaled_linear" (Rombach et al. 2022).

    Raises:
        ValueError: unknown name, T < 1, or a T so small that betas leave [0, 1] ("linear" needs T >= 20).
    """
    check_count("num_timesteps", num_timesteps)
    if name == "linear":
        scale = 1000 / num_timesteps
        betas = np.linspace(scale * 0.0001, scale * 0.02, num_timesteps, dtype=np.float64)
        if betas.max() > 1:
            raise ValueError(f"num_timesteps: the linear schedule needs at least 20, got {num_timesteps}")
        return betas
    if name in ("cosine", "squaredcos_cap_v2"):
        return betas_for_alpha_bar(num_timesteps, lambda t: np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2)
    if name == "scaled_linear":
        return np.linspace(0.00085**0.5, 0.012**0.5, num_timesteps, dtype=np.float64) ** 2
    raise ValueError(f"name: unknown beta schedule {name!r}, expected one of {', '.join(BETA_SCHEDULES)}")


@takes_numbers
def legacy_betas(name: str, *, beta_start: float, beta_end: float, num_timesteps: int) -> Array:
    """Betas float64 [T] of GLIDE's deprecated `get_beta_schedule`: "quad", "linear", "warmup10", "warmup50", "const" or
    "jsd". ValueError for an unknown name, or T < 1."""
    check_count("num_timesteps", num_timesteps)
    if name == "quad":
        return np.linspace(beta_start**0.5, beta_end**0.5, num_timesteps, dtype=np.float64) ** 2
    # By name, the share of the timesteps over which betas rise to the last one.
    shares = {"linear": 1.0, "warmup10": 0.1, "warmup50": 0.5, "const": 0.0}
    if name in shares:
        betas = np.full(num_timesteps, beta_end, dtype=np.float64)
        rise = int(num_timesteps * shares[name])
        betas[:rise] = np.linspace(beta_start, beta_end, rise, dtype=np.float64)
        return betas
    if name == "jsd":
        return 1.0 / np.linspace(num_timesteps, 1, num_timesteps, dtype=np.float64)
    raise ValueError(f"name: unknown beta schedule {name!r}, expected one of {', '.join(LEGACY_BETA_SCHEDULES)}")


@takes_numbers
def space_timesteps(num_timesteps: int, section_counts: str | Sequence[int]) -> set[int]:
    """The timesteps that a shorter process keeps of T (guided-diffusion's and GLIDE's `space_timesteps`).

    Args:
        num_timesteps: T.
        section_counts: how many steps to keep of each of as many equal sections: a list, or a string like "10,15,20" or
            "100". "ddimN" keeps N steps at an integer stride (Song et al. 2020); "fast27" is GLIDE's choice for its
            upsampler, made by hand.

    Raises:
        ValueError: malformed string, no sections, or more steps asked of a section than it has.

    Example:
        >>> sorted(space_timesteps(1000, "2"))
        [0, 999]
    """
    if isinstance(section_counts, str):
        if section_counts.startswith("ddim"):
            (wanted,) = _counts([section_counts[len("ddim") :]], section_counts)
            for step in range(1, num_timesteps):
                if len(range(0, num_timesteps, step)) == wanted:
                    return set(range(0, num_timesteps, step))
            problem = f"no integer stride over {num_timesteps} timesteps gives {wanted} steps"
            raise ValueError(f"section_counts: {problem}, got {section_counts!r}")
        if section_counts == "fast27":
            # The noisiest step moves by two: GLIDE's authors saw DDIM artifacts.
            return (space_timesteps(num_timesteps, "10,10,3,2,2") - {num_timesteps - 1}) | {num_timesteps - 3}
        section_counts = _counts(section_counts.split(","), section_counts)
    section_counts = [plain(count) for count in section_counts]
    if not section_counts:
        raise ValueError("section_counts: got an empty list, expected at least one count")

    base, longer = divmod(num_timesteps, len(section_counts))
    kept: set[int] = set()
    start = 0
    for section, count in enumerate(section_counts):
        size = base + (section < longer)
        if size < count:
            raise ValueError(f"section_counts: cannot keep {count} steps of a section of {size}")
        stride = 1.0 if count <= 1 else (size - 1) / (count - 1)
        position = 0.0
        for _ in range(count):
            # The accumulated float and Python's round-half-to-even are part of the interface: checkpoints are sampled
            # at these steps.
            kept.add(start + round(position))
            position += stride
        start += size
    return kept


@takes_numbers
def consistency_timesteps(n: int, num_timesteps: int = 1000, original_steps: int = 50) -> list[int]:
    """The timesteps that consistency models are distilled for, and sampled at (diffusers' LCMScheduler): n of the
    multiples of num_timesteps // original_steps, less 1, the noisiest first.

    Raises:
        ValueError: n not in 1 ... original_steps, or original_steps above num_timesteps.

    Example:
        >>> consistency_timesteps(4)
        [999, 759, 499, 259]
    """
    if not 1 <= n <= original_steps <= num_timesteps:
        raise ValueError(f"n: got {n}, expected 1 <= n <= original_steps {original_steps} <= {num_timesteps}")
    kept = np.arange(original_steps, 0, -1) * (num_timesteps // original_steps) - 1
    return kept[np.floor(np.linspace(0, original_steps, n, endpoint=False)).astype(np.int64)].tolist()


@dataclass(frozen=True, eq=False)
class Schedule:
    """The betas of a diffusion process and everything derived from them.

    Attributes:
        betas: float64 [T] in (0, 1], indexed by the (re-spaced) timestep, 0 being the least noisy.
        timestep_map: int64 [T], the original process's timestep for each one; the model is called with it.
        original_num_timesteps: T of the original process.

    Raises:
        ValueError: betas that are not one-dimensional, empty, or outside (0, 1].

    Example:
        >>> schedule = Schedule.named("squaredcos_cap_v2", 1000).respace("50")
        >>> schedule.num_timesteps, int(schedule.timestep_map[-1])
        (50, 999)
    """

    betas: Array
    timestep_map: NDArray[np.int64] = None  # type: ignore[assignment]  # until __post_init__
    original_num_timesteps: int = 0

    def __post_init__(self) -> None:
        betas = np.array(self.betas, dtype=np.float64)
        if betas.ndim != 1 or not betas.size:
            raise ValueError(f"betas: got shape {betas.shape}, expected one dimension and at least one value")
        if not ((betas > 0).all() and (betas <= 1).all()):
            raise ValueError(f"betas: got values in [{betas.min():g}, {betas.max():g}], expected (0, 1]")
        steps = np.arange(len(betas)) if self.timestep_map is None else np.array(self.timestep_map, dtype=np.int64)
        if steps.shape != betas.shape:
            raise ValueError(f"timestep_map: got shape {steps.shape}, expected {betas.shape}")
        object.__setattr__(self, "betas", betas)
        object.__setattr__(self, "timestep_map", steps)
        object.__setattr__(self, "original_num_timesteps", self.original_num_timesteps or len(betas))

    def __repr__(self) -> str:
        steps = f"{self.num_timesteps} of {self.original_num_timesteps} timesteps"
        return f"Schedule({steps}, betas {self.betas[0]:.3g} to {self.betas[-1]:.3g})"

    @classmethod
    def named(cls, name: str, num_timesteps: int = 1000) -> Schedule:
        """The schedule with `named_betas(name, num_timesteps)`."""
        return cls(named_betas(name, num_timesteps))

    def respace(self, timesteps: str | int | Sequence[int] | set[int]) -> Schedule:
        """Keep some timesteps, a collection or a string or integer for `space_timesteps`, with betas re-derived so that
        alphas_cumprod is unchanged at them (guided-diffusion's `SpacedDiffusion`). The new `timestep_map` refers to the
        original process, also after several calls.

        Raises:
            ValueError: no timestep kept, or one outside the process.
        """
        if (count := as_integer(timesteps)) is not None:
            timesteps = str(count)
        if isinstance(timesteps, str):
            timesteps = space_timesteps(self.num_timesteps, timesteps)
        keep = sorted({index(step) for step in timesteps})  # type: ignore[union-attr]
        if not keep or keep[0] < 0 or keep[-1] >= self.num_timesteps:
            got, expected = keep or "none", f"at least one in 0 ... {self.num_timesteps - 1}"
            raise ValueError(f"timesteps: got {got}, expected {expected}")
        return self._with(self.alphas_cumprod[keep], self.timestep_map[keep])

    def zero_terminal_snr(self) -> Schedule:
        """The process whose √ᾱ are shifted to end at 0, pure noise, and scaled to begin as before (Lin et al. 2023,
        https://arxiv.org/abs/2305.08891, algorithm 1). Its model predicts v: ε does not determine x0 there.

        Apply it before re-spacing. Solvers in noise-level space refuse it, because sigma is infinite at its end.

        Raises:
            ValueError: a single timestep.
        """
        if self.num_timesteps == 1:
            raise ValueError("betas: got one timestep, expected at least 2")
        root = self.sqrt_alphas_cumprod
        ᾱ = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
        return self._with(ᾱ, self.timestep_map)

    def _with(self, ᾱ: Array, timestep_map: NDArray[np.int64]) -> Schedule:
        """The schedule with some ᾱ at some timesteps of the same original process."""
        return Schedule(1 - ᾱ / np.append(1.0, ᾱ[:-1]), timestep_map, self.original_num_timesteps)

    @property
    def num_timesteps(self) -> int:
        """T, the number of timesteps."""
        return len(self.betas)

    def model_timesteps(self, rescale: bool = False) -> Array:
        """float64 [T]: the time the model is given at each timestep; with `rescale`, mapped to the range of a 1000-step
        process."""
        steps = np.asarray(self.timestep_map, dtype=np.float64)
        return steps * np.float64(1000.0 / self.original_num_timesteps) if rescale else steps

    @cached_property
    def alphas_cumprod(self) -> Array:
        """ᾱ_t, the product of 1 - β up to and including t."""
        return np.cumprod(1.0 - self.betas, dtype=np.float64)

    @cached_property
    def alphas_cumprod_prev(self) -> Array:
        """ᾱ_{t-1}, 1 before the first step."""
        return np.append(1.0, self.alphas_cumprod[:-1])

    @cached_property
    def alphas_cumprod_next(self) -> Array:
        """ᾱ_{t+1}, 0 after the last step."""
        return np.append(self.alphas_cumprod[1:], 0.0)

    @cached_property
    def sqrt_alphas_cumprod(self) -> Array:
        """√ᾱ_t, the scale of x0 in x_t."""
        return np.sqrt(self.alphas_cumprod)

    @cached_property
    def sqrt_one_minus_alphas_cumprod(self) -> Array:
        """√(1 - ᾱ_t), the scale of ε in x_t."""
        return np.sqrt(1.0 - self.alphas_cumprod)

    @cached_property
    def log_one_minus_alphas_cumprod(self) -> Array:
        """log(1 - ᾱ_t)."""
        return np.log(1.0 - self.alphas_cumprod)

    @cached_property
    def sqrt_recip_alphas_cumprod(self) -> Array:
        """√(1 / ᾱ_t)."""
        with np.errstate(divide="ignore"):
            return np.sqrt(1.0 / self.alphas_cumprod)

    @cached_property
    def sqrt_recipm1_alphas_cumprod(self) -> Array:
        """√(1 / ᾱ_t - 1)."""
        with np.errstate(divide="ignore"):
            return np.sqrt(1.0 / self.alphas_cumprod - 1)

    @cached_property
    def posterior_variance(self) -> Array:
        """β̃_t, the variance of q(x_{t-1} | x_t, x0); 0 at t = 0."""
        return self.betas * (1.0 - self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)

    @cached_property
    def posterior_log_variance_clipped(self) -> Array:
        """log β̃_t, where β̃_0 = 0 is replaced by β̃_1 (by β_0 in a process of one step)."""
        return np.log(np.append(self._first_variance, self.posterior_variance[1:]))

    @cached_property
    def posterior_mean_coef1(self) -> Array:
        """The coefficient of x0 in the mean of q(x_{t-1} | x_t, x0)."""
        return self.betas * np.sqrt(self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)

    @cached_property
    def posterior_mean_coef2(self) -> Array:
        """The coefficient of x_t in the mean of q(x_{t-1} | x_t, x0)."""
        return (1.0 - self.alphas_cumprod_prev) * np.sqrt(1.0 - self.betas) / (1.0 - self.alphas_cumprod)

    @cached_property
    def fixed_large_variance(self) -> Array:
        """β_t with β̃_1 at t = 0: the "fixed large" variance."""
        return np.append(self._first_variance, self.betas[1:])

    @property
    def _first_variance(self) -> np.float64:
        return self.posterior_variance[1] if self.num_timesteps > 1 else self.betas[0]


def _counts(texts: Sequence[str], section_counts: str) -> list[int]:
    try:
        return [int(text) for text in texts]
    except ValueError:
        expected = "'100', '10,15,20', 'ddim25' or the like, or 'fast27'"
        raise ValueError(f"section_counts: got {section_counts!r}, expected {expected}") from None
