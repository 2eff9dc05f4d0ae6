"""What is noticed between a capture and a replay, and what is not."""

from __future__ import annotations

import gc
import types
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from fastcfg.engine.staleness import Fingerprint, torch_settings

pytestmark = pytest.mark.quick

CPU = torch.device("cpu")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(3, 3), nn.SiLU())
        self.conv = nn.Conv1d(3, 3, 1, bias=False)
        self.register_buffer("scale", torch.ones(3))
        self.table = torch.ones(2)
        # As adapters keep their strengths.
        self.scaling, self.merged, self._disable_adapters = {"default": 1.0}, [], False

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.encoder(x)[..., None])[..., 0] * self.scale


class Lora(nn.Module):
    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base, self.down = base, nn.Linear(3, 3)


def changes_of(change: Callable[[Net], Any], reach: Callable[[Net], Any] = lambda net: net) -> str:
    net = Net()
    function = reach(net)
    before = Fingerprint({"model": function, "cond_fn": None})
    assert before.changes({"model": function, "cond_fn": None}) == ""
    change(net)
    return before.changes({"model": function, "cond_fn": None})


def halved(tensor: Tensor) -> Tensor:
    return tensor.detach() * 0.5


FIRST = "model.scale, model.encoder.0.weight, model.encoder.0.bias and 1 more replaced"
WEIGHT = "model.conv.weight replaced"
LORA = (
    "model.conv replaced; model.conv.base, model.conv.base.weight, model.conv.down and 2 more new; "
    "model.conv.weight gone"
)


def another(net: Net) -> nn.Parameter:
    return nn.Parameter(halved(net.conv.weight))


CHANGES: dict[str, tuple[Callable[[Net], Any], str]] = {
    "dtype": (lambda net: net.double(), FIRST),
    "data": (lambda net: setattr(net.conv.weight, "data", halved(net.conv.weight)), WEIGHT),
    "parameter": (lambda net: setattr(net.conv, "weight", another(net)), WEIGHT),
    "strides": (lambda net: setattr(net.conv.weight, "data", net.conv.weight.data.transpose(0, 1)), WEIGHT),
    "buffer": (lambda net: setattr(net, "scale", torch.zeros(3)), "model.scale replaced"),
    "tensor": (lambda net: setattr(net, "table", torch.zeros(2)), "model.table replaced"),
    "assigned": (lambda net: net.load_state_dict({k: v * 1 for k, v in net.state_dict().items()}, assign=True), FIRST),
    "lora": (lambda net: setattr(net, "conv", Lora(net.conv)), LORA),
    "submodule of the same kind": (lambda net: setattr(net, "conv", nn.Conv1d(3, 3, 1, bias=False)), WEIGHT),
    "layer gone": (lambda net: net.encoder.pop(1), "model.encoder.1 gone"),
    "eval": (lambda net: net.encoder[1].eval(), "model.encoder.1 replaced"),
    "hook": (lambda net: net.conv.register_forward_hook(print), "model.conv replaced"),
    "pre-hook": (lambda net: net.conv.register_forward_pre_hook(print), "model.conv replaced"),
    "patched forward": (
        lambda net: setattr(net.conv, "forward", types.MethodType(lambda self, x: x, net.conv)),
        "model.conv.forward.func new",
    ),
}


SCALES: dict[str, tuple[Callable[[Net], Any], str]] = {
    "strength": (lambda net: net.scaling.update(default=0.5), "model.scaling.default replaced"),
    "flag": (lambda net: setattr(net, "_disable_adapters", True), "model._disable_adapters replaced"),
    "list": (lambda net: net.merged.append("style"), "model.merged.0 new"),
    "not a number": (lambda net: net.scaling.update(default=float("nan")), "model.scaling.default replaced"),
}
CHANGES |= SCALES


@pytest.mark.parametrize("name", CHANGES)
def test_what_was_replaced_is_named(name: str) -> None:
    # Freed memory may be given to what replaces it: then nothing has moved, and what was captured still stands.
    kept = [torch.empty(9) for _ in range(50)]
    assert changes_of(CHANGES[name][0]) == CHANGES[name][1]
    del kept


def test_another_patch_of_a_patched_forward() -> None:
    net = Net()
    net.conv.forward = lambda x: x  # type: ignore[method-assign]
    before = Fingerprint({"model": net})
    net.conv.forward = lambda x: 2 * x  # type: ignore[method-assign]
    assert before.changes({"model": net}) == "model.conv.forward replaced"


def step(net: Net) -> None:
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.Adam(net.parameters()).step()


def test_another_forward_of_the_class() -> None:
    class Patched(Net):
        pass

    net = Patched()
    before = Fingerprint({"model": net})
    assert before.changes({"model": net}) == ""
    Patched.forward = lambda self, x: x  # type: ignore[method-assign, assignment]
    assert before.changes({"model": net}) == "model replaced"


@pytest.mark.parametrize(
    "change",
    [
        step,
        lambda net: net.load_state_dict({k: 0.5 * v for k, v in net.state_dict().items()}),
        lambda net: net.conv.weight.data.mul_(0.5),
        lambda net: net.requires_grad_(False),
        lambda net: net(torch.ones(1, 3)),
    ],
    ids=["optimizer", "state dict", "data", "requires_grad", "a call"],
)
def test_what_changes_in_place_is_none_of_its_business(change: Callable[[Net], Any]) -> None:
    assert changes_of(change) == ""


# Ways that lead to a model

model: Any = None


def model_fn(x: Tensor, t: Tensor, **kwargs: Any) -> Any:
    """As in GLIDE's notebooks: the model is a global."""
    half = x[: len(x) // 2]
    return [model(torch.cat([half, half]), **kwargs) for _ in range(1)]


guidance_scale = 3.0


def test_numbers_among_globals_closures_and_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in GLIDE's notebooks, where a cell changes the guidance scale and the function stays."""
    scale = 3.0
    holder = Holder(Net())
    holder.scale = 3.0  # type: ignore[attr-defined]
    functions: dict[str, Any] = {
        "global": lambda x: guidance_scale * x,
        "closure": lambda x: scale * x,
        "partial": partial(lambda x, scale: scale * x, scale=scale),
        "object": holder,
    }
    before = {name: Fingerprint({"model": function}) for name, function in functions.items()}
    assert not any(before[name].changes({"model": function}) for name, function in functions.items())
    monkeypatch.setattr(f"{__name__}.guidance_scale", 5.0)
    scale = holder.scale = 5.0  # type: ignore[attr-defined]
    functions["partial"].keywords["scale"] = 5.0
    told = {name: before[name].changes({"model": function}) for name, function in functions.items()}
    assert told == {
        "global": "model.guidance_scale replaced",
        "closure": "model.scale replaced",
        "partial": "model.keywords.scale replaced",
        "object": "model.scale replaced",
    }


def by_global(net: Net) -> Any:
    global model
    model = net
    return model_fn


def by_wrapper(net: Net) -> Any:
    inner = by_global(net)
    return lambda x: inner(x)


def by_closure(net: Net) -> Any:
    return lambda x: net(x)


def by_default(net: Net) -> Any:
    return lambda x, *, net=net: net(x)


def by_nested_function(net: Net) -> Any:
    def outer(x: Tensor) -> Any:
        def inner() -> Any:
            return net(x)

        return inner()

    return outer


class Holder:
    def __init__(self, net: Net) -> None:
        self.nets = {"first": [net]}

    def __call__(self, x: Tensor) -> Any:
        return self.nets["first"][0](x)

    def method(self, x: Tensor) -> Any:
        return self(x)


WAYS: dict[str, Callable[[Net], Any]] = {
    "global": by_global,
    "wrapper": by_wrapper,
    "closure": by_closure,
    "default": by_default,
    "nested": by_nested_function,
    "partial": lambda net: partial(lambda net, x: net(x), net),
    "keyword of a partial": lambda net: partial(lambda x, net: net(x), net=net),
    "method": lambda net: Holder(net).method,
    "module's method": lambda net: net.forward,
    "object": Holder,
    "compiled module": lambda net: torch.compile(net, backend="eager"),
    "compiled function": lambda net: torch.compile(by_closure(net), backend="eager"),
    "module in place": lambda net: net.compile(backend="eager") or net,
}


@pytest.mark.parametrize("way", WAYS)
def test_a_model_is_found(way: str) -> None:
    def change(net: Net) -> None:
        net.conv.weight.data = halved(net.conv.weight)

    difference = changes_of(change, WAYS[way])
    assert difference.endswith("conv.weight replaced"), difference
    assert "," not in difference


def test_what_is_not_a_model_is_passed_over() -> None:
    loop: list[Any] = [print, torch, Tensor, 3, "text", None]
    loop.append(loop)
    assert Fingerprint({"model": lambda x, loop=loop: loop})._names == [
        "model",
        "model.defaults.0.3",
        "model.defaults.0.4",
    ]
    many = list(range(5000))
    assert Fingerprint({"model": lambda x: many})._names == ["model"]


def test_nothing_is_kept_alive() -> None:
    net = Net()
    storage = StorageWeakRef(net.conv.weight.untyped_storage())
    before = Fingerprint({"model": by_closure(net)})
    net.conv.weight.data = torch.zeros(1)
    gc.collect()
    assert storage.expired()
    alive = [net]
    reference = weakref.ref(net)
    alive.clear()
    del net
    gc.collect()
    assert reference() is None
    assert before.changes({"model": None}).endswith("gone")


def test_tensors_without_memory_of_their_own() -> None:
    net = nn.ModuleList([nn.Linear(3, 3, device="meta"), nn.LazyLinear(3)])
    before = Fingerprint({"model": net})
    assert before.changes({"model": net}) == ""


class Packed(Tensor):
    """A quantised weight, as a subclass that holds tensors."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> Packed:
        return Tensor._make_wrapper_subclass(cls, values.shape)  # type: ignore[attr-defined, no-any-return]

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["values"], None

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError


def test_a_subclass_is_looked_into() -> None:
    net = nn.Module()
    net.weight = Packed(torch.ones(3))  # type: ignore[assignment]
    net._buffers["weight"] = net.__dict__.pop("weight")
    before = Fingerprint({"model": net})
    net.weight.values.zero_()
    assert before.changes({"model": net}) == ""
    net.weight.values = torch.ones(3)
    assert before.changes({"model": net}) == "model.weight replaced"


# Settings


def set_and_restore(owner: Any, name: str, value: Any) -> Any:
    old = getattr(owner, name)
    setattr(owner, name, value)
    return lambda: setattr(owner, name, old)


def call_and_restore(call: Callable[[Any], Any], new: Any, old: Any) -> Any:
    call(new)
    return lambda: call(old)


SETTINGS: dict[str, Callable[[], Callable[[], Any]]] = {
    "default dtype": lambda: call_and_restore(torch.set_default_dtype, torch.float64, torch.float32),
    "matmul precision": lambda: call_and_restore(torch.set_float32_matmul_precision, "medium", "highest"),
    "deterministic": lambda: call_and_restore(torch.use_deterministic_algorithms, True, False),
    "cudnn": lambda: set_and_restore(torch.backends.cudnn, "benchmark", True),
    "cudnn tf32": lambda: set_and_restore(torch.backends.cudnn, "allow_tf32", False),
    "fp16": lambda: set_and_restore(torch.backends.cuda.matmul, "allow_fp16_reduced_precision_reduction", False),
    "flash": lambda: call_and_restore(torch.backends.cuda.enable_flash_sdp, False, True),
    "efficient": lambda: call_and_restore(torch.backends.cuda.enable_mem_efficient_sdp, False, True),
    "cudnn attention": lambda: call_and_restore(torch.backends.cuda.enable_cudnn_sdp, False, True),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_torchs_settings_are_noticed(name: str) -> None:
    before = torch_settings(CPU)
    assert hash(before) == hash(torch_settings(CPU))
    restore = SETTINGS[name]()
    try:
        assert torch_settings(CPU) != before
    finally:
        restore()
    assert torch_settings(CPU) == before


def test_autocast_is_noticed_for_its_device() -> None:
    outside = {device: torch_settings(torch.device(device)) for device in ("cpu", "cuda")}
    with torch.autocast("cpu", torch.bfloat16):
        assert torch_settings(CPU) != outside["cpu"]
        assert torch_settings(torch.device("cuda")) == outside["cuda"]
    with torch.autocast("cpu", torch.float16):
        inside = torch_settings(CPU)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch_settings(CPU) != inside
    assert not torch.cuda.is_initialized()
