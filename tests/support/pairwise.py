"""Covering arrays of strength two: few cases in which every pair of option values occurs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Mapping, Sequence

Pair = tuple[tuple[str, Hashable], tuple[str, Hashable]]


def pairs_of(case: Mapping[str, Hashable]) -> set[Pair]:
    """Every pair of (factor, value) in a case."""
    return set(itertools.combinations(sorted(case.items(), key=lambda item: item[0]), 2))


def all_pairs(
    factors: Mapping[str, Sequence[Hashable]], forbidden: Callable[[Mapping[str, Hashable]], bool]
) -> set[Pair]:
    """Every pair of values of different factors that is not forbidden by itself."""
    pairs = set()
    for a, b in itertools.combinations(sorted(factors), 2):
        pairs |= {((a, x), (b, y)) for x in factors[a] for y in factors[b] if not forbidden({a: x, b: y})}
    return pairs


def pairwise(
    factors: Mapping[str, Sequence[Hashable]], forbidden: Callable[[Mapping[str, Hashable]], bool] = lambda case: False
) -> list[dict[str, Hashable]]:
    """Cases in which every pair of values occurs; the same every time.

    Each case starts from a pair not seen yet and takes, factor by factor, the value that adds the most such pairs (of
    equals the one used least).

    Args:
        factors: the values of each factor.
        forbidden: whether a case, or the part of one chosen so far, must not occur.

    Raises:
        ValueError: a pair that no case can hold.
    """
    missing = all_pairs(factors, forbidden)
    used = {(name, value): 0 for name, values in factors.items() for value in values}
    cases = []
    while missing:
        # The order must not depend on hashing.
        start = min(missing, key=lambda pair: (used[pair[0]] + used[pair[1]], repr(pair)))
        case = dict(start)
        for name in sorted(set(factors) - set(case), key=lambda name: (-len(factors[name]), name)):
            allowed = [value for value in factors[name] if not forbidden({**case, name: value})]
            if not allowed:
                raise ValueError(f"pair {start}: no value of {name} goes with it")
            gains = {value: len(missing & pairs_of_value(case, name, value)) for value in allowed}
            case[name] = min(allowed, key=lambda value: (-gains[value], used[name, value]))
        for item in case.items():
            used[item] += 1
        missing -= pairs_of(case)
        cases.append({name: case[name] for name in factors})
    return cases


def pairs_of_value(case: Mapping[str, Hashable], name: str, value: Hashable) -> set[Pair]:
    """The pairs that a value adds to a case."""
    return {((name, value), item) if name < item[0] else (item, (name, value)) for item in case.items()}
