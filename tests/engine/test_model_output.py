"""What models return: tensors, tuples, dictionaries, objects, and what a user's function makes of the rest."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from fastcfg import CFG, Sampler, SamplerConfig, Schedule, solvers
from fastcfg.engine.model_output import FIELDS, output_tensor

pytestmark = pytest.mark.quick
TABLE = solvers.ddim(Schedule.named("linear").respace(4))
SHAPE = (2, 3, 4, 4)


@dataclass
class Output:
    sample: Tensor
    features: Tensor


class Fields(OrderedDict[str, Any]):
    """A dictionary with attributes, as diffusers' outputs are."""


WAYS = {
    "tuple": lambda out: (out, None),
    "list": lambda out: [out],
    "object": lambda out: Output(out, out.flatten()),
    "ordered": lambda out: Fields(sample=out, hidden=out[:1]),
    **{name: (lambda out, name=name: {name: out, "loss": None}) for name in FIELDS},
}


def sample(model: Any, **options: Any) -> Tensor:
    labels = {"cond": {"y": torch.ones(2)}, "uncond": {"y": torch.zeros(2)}}
    return Sampler(model, TABLE, guidance=CFG(2.0), **options).sample(SHAPE, seed=1, **labels)


def predict(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return torch.tanh(x) * (1 + y.view(-1, 1, 1, 1))


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_known_outputs_are_read(way: str, graph: bool) -> None:
    got = sample(lambda x, t, y: WAYS[way](predict(x, t, y)), graph=graph)
    assert torch.equal(got, sample(predict))


def last_layer(returned: dict[str, list[Tensor]]) -> Tensor:
    return returned["layers"][-1]


def test_a_function_reads_any_other_output() -> None:
    options = {"config": SamplerConfig(output=last_layer)}
    got = sample(lambda x, t, y: {"layers": [x, predict(x, t, y)]}, **options)
    assert torch.equal(got, sample(predict))
    assert pickle.loads(pickle.dumps(options["config"])).output is last_layer
    with pytest.raises(TypeError, match="output: got str, expected a function or None"):
        SamplerConfig(output="sample")


@pytest.mark.parametrize(
    ("returned", "got"),
    [
        (None, "NoneType"),
        ((), "tuple"),
        ({"loss": torch.zeros(1)}, "dict"),
        ({"sample": torch.zeros(1), "pred": torch.zeros(1)}, "dict with sample and pred"),
    ],
)
def test_other_outputs_are_refused(returned: Any, got: str) -> None:
    with pytest.raises(TypeError, match=rf"model: got a {got} from it, expected a tensor.* SamplerConfig\(output=\)"):
        output_tensor(returned)
    with pytest.raises(TypeError, match="model: got a"):
        sample(lambda x, t, y: returned)
