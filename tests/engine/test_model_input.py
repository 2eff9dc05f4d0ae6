"""The dtype and the device of a model's input, by what the model says of itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastcfg import Sampler, Schedule, solvers
from fastcfg.engine.model_input import input_device, input_dtype

pytestmark = pytest.mark.quick

TABLE = solvers.ddim(Schedule.named("linear").respace(4))
F8, F16, BF16, F32 = torch.float8_e4m3fn, torch.float16, torch.bfloat16, torch.float32


class Net(nn.Module):
    """Parameters of some dtypes; computes in the dtype of its input."""

    def __init__(self, *dtypes: torch.dtype) -> None:
        super().__init__()
        for i, dtype in enumerate(dtypes):
            weight = torch.full((1,), 0.5).to(dtype)
            self.register_parameter(f"p{i}", nn.Parameter(weight, requires_grad=False))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.seen = x.dtype
        for parameter in self.parameters():
            x = x * parameter.to(x.dtype)
        return x


class Declaring(Net):
    declared: Any = BF16

    @property
    def dtype(self) -> Any:
        return self.declared


def attribute(model: nn.Module, **values: Any) -> nn.Module:
    for name, value in values.items():
        setattr(model, name, value)
    return model


def hooked(model: nn.Module, hook: Any) -> nn.Module:
    return attribute(model, _diffusers_hook=SimpleNamespace(hooks={"layerwise_casting": hook}))


def within(model: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Identity(), model)


DTYPES: dict[str, tuple[Any, torch.dtype]] = {
    "float32": (lambda: Net(F32), F32),
    "half": (lambda: Net(F16), F16),
    "first of two": (lambda: Net(F32, F16), F32),
    "float8 alone": (lambda: Net(F8), F32),
    "float8 e5m2, norms in bfloat16": (lambda: Net(torch.float8_e5m2, BF16), BF16),
    "integers first": (lambda: Net(torch.int8, F16), F16),
    "integers alone": (lambda: Net(torch.uint8), F32),
    "no parameters": (lambda: Net(), F32),
    "a property": (lambda: Declaring(F32), BF16),
    "a property over float8": (lambda: Declaring(F8), BF16),
    "a property that names storage": (lambda: attribute(Declaring(F8, F16), declared=F8), F16),
    "a property that is none": (lambda: attribute(Declaring(F16), declared="half"), F16),
    "an attribute beside parameters": (lambda: attribute(Net(F32, F16), dtype=F16), F32),  # guided-diffusion's
    "an attribute over integers": (lambda: attribute(Net(torch.int8), dtype=F16), F16),
    "a hook that casts": (lambda: hooked(Net(F8, F32), SimpleNamespace(compute_dtype=BF16)), BF16),
    "a hook inside": (lambda: within(hooked(Net(F8), SimpleNamespace(compute_dtype=F16))), F16),
    "a quantised layer": (lambda: within(attribute(Net(torch.uint8), compute_dtype=BF16)), BF16),
    "compiled": (lambda: torch.compile(Declaring(F8), backend="eager"), BF16),
    "a function": (lambda: lambda x, t: x, F32),
}


@pytest.mark.parametrize("name", DTYPES)
def test_the_input_has_the_dtype_that_the_model_computes_in(name: str) -> None:
    make, expected = DTYPES[name]
    model = make()
    assert input_dtype(model) == expected
    assert Sampler(model, TABLE).dtype == expected
    assert Sampler(model, TABLE, dtype=torch.float64).dtype == torch.float64


@pytest.mark.parametrize("dtype", [F8, torch.float8_e5m2, torch.int8])
def test_storage_of_8_bits_is_not_what_the_model_is_fed(dtype: torch.dtype) -> None:
    model = Net(dtype)
    assert Sampler(model, TABLE, clip=1.0).sample((1, 3, 4, 4), seed=0).isfinite().all()
    assert model.seen == F32


def test_layerwise_casting_of_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    blocks: dict[str, Any] = {"block_out_channels": (16,), "down_block_types": ("DownBlock2D",)}
    blocks |= {"up_block_types": ("UpBlock2D",), "layers_per_block": 1, "norm_num_groups": 8}
    for compute in (F32, BF16):
        torch.manual_seed(0)
        unet = diffusers.UNet2DModel(sample_size=8, in_channels=3, out_channels=3, **blocks).to(compute)
        unet.enable_layerwise_casting(storage_dtype=F8, compute_dtype=compute)
        sampler = Sampler(unet, TABLE, clip=1.0)
        assert sampler.dtype == compute
        assert sampler.sample((1, 3, 8, 8), seed=0).isfinite().all()


# Devices


def on_meta(*dtypes: torch.dtype) -> Net:
    return Net(*(dtypes or (F32,))).to("meta")


class Loading(Net):
    """Has its weights between the calls on "meta", as offloaded models."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x * torch.full_like(self.p0, 0.5, device=x.device)  # type: ignore[arg-type]


def offloaded(device: Any, inside: bool = False, several: bool = False) -> nn.Module:
    hook: Any = SimpleNamespace(execution_device=device)
    if several:
        hook = SimpleNamespace(hooks=(SimpleNamespace(), hook))
    model = attribute(Loading(F32).to("meta"), _hf_hook=hook)
    return nn.ModuleDict({"part": model}) if inside else model


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
@pytest.mark.parametrize("several", [False, True])
def test_a_hook_says_where_an_offloaded_model_computes(device: Any, several: bool) -> None:
    sampler = Sampler(offloaded(device, several=several), TABLE)
    assert sampler.device == torch.device("cpu")
    assert sampler.sample((1, 3, 4, 4), seed=0).isfinite().all()
    assert input_device(offloaded(device, inside=True)) == torch.device("cpu")


def test_hooks_name_gpus_by_number_too() -> None:
    assert input_device(offloaded(1)) == torch.device("cuda", 1)
    group = SimpleNamespace(group=SimpleNamespace(onload_device=torch.device("cuda", 2)))
    assert input_device(hooked(on_meta(), group)) == torch.device("cuda", 2)


def test_some_weights_on_meta_leave_the_device_to_the_others() -> None:
    assert input_device(nn.ModuleList([on_meta(), Net(F32)])) == torch.device("cpu")


def test_weights_on_meta_alone_are_refused() -> None:
    with pytest.raises(ValueError, match="model: got weights on the meta device, expected loaded ones"):
        Sampler(Loading(F32).to("meta"), TABLE)
    with pytest.raises(ValueError, match="device: got 'meta', expected 'cpu', or a GPU"):
        Sampler(Net(F32), TABLE, device="meta")
    sampler = Sampler(Loading(F32).to("meta"), TABLE, device="cpu")
    assert sampler.sample((1, 3, 4, 4), seed=0).isfinite().all()
