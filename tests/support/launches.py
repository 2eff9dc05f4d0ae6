"""What a profiler saw between replays of graphs."""

from __future__ import annotations

from collections import Counter

_WORDS = ("Launch", "Memcpy", "Memset", "Synchronize", "Malloc", "Free")


def beside_the_graphs(called: Counter[str], done: Counter[str], programs: int) -> dict[str, int]:
    """What a run did beside one graph launch for each of its programs.

    Args:
        called: CUDA's functions called by the host between the first and the last program, by name.
        done: the device's kernels and copies in the whole run, by name.
        programs: how many replays there are.

    Returns:
        Surplus (or, negative, missing) calls, and copies between host and device.
    """
    others = Counter({call: count for call, count in called.items() if any(word in call for word in _WORDS)})
    others["cudaGraphLaunch"] -= programs
    # Before every replay, some versions of torch put seed and offset of the generator where the graph reads them.
    fills = sum(count for event, count in done.items() if "FillFunctor" in event)
    if fills == others["cudaLaunchKernel"] == 2 * programs:
        del others["cudaLaunchKernel"]
    crossings = {event: count for event, count in done.items() if "HtoD" in event or "DtoH" in event}
    return {name: count for name, count in others.items() if count} | crossings
