"""State dicts are loaded as copies, in float32, onto networks with or without weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from fastcfg.models.weights import load_weights, read_state_dict

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_weights_are_copies_in_float32(device: str) -> None:
    with torch.device(device):
        model = nn.Linear(2, 3).requires_grad_(False)
    given = {"bias": torch.ones(3), "weight": torch.full((3, 2), 0.5, dtype=torch.float16)}
    load_weights(model, given, "somewhere")
    assert model.weight.dtype == torch.float32
    assert not model.weight.requires_grad
    model.bias += 1
    assert torch.equal(given["bias"], torch.ones(3))


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    torch.save({"weight": Trap()}, tmp_path / "base.pt")
    with pytest.raises(ValueError, match=r"weights .*base.pt: got a file that cannot be loaded, expected a state dict"):
        read_state_dict(tmp_path / "base.pt")
    assert not (tmp_path / "sprung").exists()
