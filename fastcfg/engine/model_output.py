"""What a model returns, as the tensor that the step takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

# Names under which models return their prediction: diffusers' networks, and what own networks use.
FIELDS = ("sample", "pred", "prediction", "out", "output", "eps", "epsilon", "logits", "x")


def output_tensor(returned: Any) -> Tensor:
    """A tensor as it is, the first item of a tuple or list, or the only field of `FIELDS` of a dictionary or object (a
    diffusers `ModelOutput`).

    Raises:
        TypeError: something else, or several such fields.
    """
    if isinstance(returned, Tensor):
        return returned
    if isinstance(returned, tuple | list) and returned and isinstance(returned[0], Tensor):
        return returned[0]
    fields = returned if isinstance(returned, Mapping) else getattr(returned, "__dict__", {})
    found = [name for name in FIELDS if isinstance(fields.get(name), Tensor)]
    if len(found) == 1:
        result: Tensor = fields[found[0]]
        return result
    got = f"{type(returned).__name__}" + f" with {' and '.join(found)}" * bool(found)
    raise TypeError(
        f"model: got a {got} from it, expected a tensor, a tuple that starts with one, or one of the fields "
        f"{', '.join(FIELDS)}; SamplerConfig(output=) takes a function for anything else"
    )
