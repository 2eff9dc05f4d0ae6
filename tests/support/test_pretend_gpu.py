"""The pretend device keeps CUDA's rules, gives the CPU's bits, and sees what networks carry across."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastcfg.models import EncoderUNetModel, SuperResText2ImUNet, Text2ImUNet, UNetModel
from support.pretend_gpu import CAN_PRETEND, TO_DEVICE, TO_HOST, Crossing, PretendGpu, PretendTensor
from support.small_networks import CLASSES, TOKENS, embed_as_the_originals, randn, text_unet, unet

pytestmark = [
    pytest.mark.quick,
    pytest.mark.skipif(not CAN_PRETEND, reason="there is a real GPU, or torch is too old to pretend one"),
]

EMBEDDING = Crossing(TO_DEVICE, "_to_copy")  # of the originals' timestep embedding, whose frequencies are the host's
CAPTURE_FAILS = "operation not permitted when stream is capturing"


@pytest.fixture
def gpu() -> Iterator[PretendGpu]:
    with PretendGpu() as gpu:
        yield gpu


class Log(TorchDispatchMode):
    """Names of operations, and the devices of their first operands and results; names of those done in place."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, str | None, str | None]] = []
        self.in_place: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        devices = [value.device.type if isinstance(value, Tensor) else None for value in (*args[:1], result)]
        self.seen.append((function.overloadpacket.__name__, devices[0], devices[-1]))
        if any(result is operand for operand in (*args[:1], (kwargs or {}).get("out"))):
            self.in_place.append(function.overloadpacket.__name__)
        return result


def grid(gpu: PretendGpu) -> PretendTensor:
    return gpu.tensor(torch.arange(6.0).view(2, 3))


# Where results live


@pytest.mark.parametrize(
    "make",
    [
        lambda x: torch.zeros(2, device="cuda"),
        lambda x: torch.arange(3, device=x.device),
        lambda x: torch.zeros_like(torch.ones(2), device="cuda:0"),
        lambda x: torch.randn(2, device="cuda"),
        lambda x: x.new_zeros(2),
        lambda x: x.sum(),
        lambda x: torch.ones(()) + x,
        lambda x: torch.sort(x).indices,
        lambda x: x.split(1)[1],
    ],
)
def test_on_the_device(gpu, make):
    result = make(grid(gpu))
    assert isinstance(result, PretendTensor)
    assert result.is_cuda
    assert result.device == torch.device("cuda", 0)
    assert gpu.crossings == []


@pytest.mark.parametrize(
    "make", [lambda x: torch.zeros(2) + 1, lambda x: torch.zeros_like(x, device="cpu"), Tensor.cpu]
)
def test_on_the_host(gpu, make):
    result = make(grid(gpu))
    assert type(result) is Tensor
    assert result.device.type == "cpu"


def test_values_are_copied_to_and_from_the_device(gpu):
    given = torch.arange(6.0).view(2, 3).t()
    x = gpu.tensor(given)
    got = gpu.host(x)
    assert torch.equal(got, given)
    assert got.stride() == x.stride() == given.stride()
    x.add_(1)
    assert torch.equal(gpu.host(x), given + 1)
    assert torch.equal(got, given)
    assert given[0, 0] == 0
    assert gpu.crossings == []
    with pytest.raises(TypeError, match="tensor: got one on cpu, expected a pretend tensor"):
        gpu.host(given)


# Memory


def test_views_share_memory(gpu):
    x = grid(gpu)
    row = x[1]
    assert row.data_ptr() == x.data_ptr() + 3 * 4
    assert row.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    row.mul_(10)
    x.t()[0] = -1
    assert gpu.host(x).tolist() == [[-1, 1, 2], [-1, 40, 50]]
    assert gpu.host(row).tolist() == [-1, 40, 50]
    assert (x + 0).data_ptr() != x.data_ptr()


def test_in_place_returns_the_operand(gpu):
    x = grid(gpu)
    assert x.add_(1) is x
    assert x.copy_(x + 1) is x
    assert x[1].clamp_(max=3) is not x
    assert gpu.host(x).tolist() == [[2, 3, 4], [3, 3, 3]]
    with Log() as log:
        torch.mul(x.add_(1), 2, out=x)
        x + 0
    assert log.in_place == ["add_", "mul"]
    assert gpu.host(x).tolist() == [[6, 8, 10], [8, 8, 8]]


def test_shapes_changed_in_place(gpu):
    x = grid(gpu)
    assert x.t_().shape == (3, 2)
    assert x.stride() == (1, 3)
    out = torch.empty(0, device="cuda")
    assert torch.add(x, 1, out=out) is out
    assert out.shape == (3, 2)
    assert torch.equal(gpu.host(out), torch.arange(1.0, 7.0).view(2, 3).t())
    out.add_(1)
    assert gpu.host(out)[0, 0] == 2


def test_data_can_be_replaced(gpu):
    x, other = grid(gpu), gpu.tensor(torch.ones(4, 1, dtype=torch.half))
    x.data = other
    assert (x.shape, x.dtype) == ((4, 1), torch.half)
    x.add_(1).t_()
    assert gpu.host(x).tolist() == [[2] * 4]
    assert gpu.host(other).tolist() == [[2]] * 4
    assert x.data.data_ptr() == x.data_ptr()
    assert x.data is not x


# Operands on both


@pytest.mark.parametrize(
    "mix",
    [
        lambda x: x + torch.ones(3),
        lambda x: torch.ones(3).add_(x[0]),
        lambda x: x.sum() * torch.ones(3),
        lambda x: torch.cat([x, torch.ones(2, 3)]),
        lambda x: F.linear(x, torch.ones(2, 3)),
        lambda x: torch.where(torch.ones(2, 3) > 0, x, 0.0),
        lambda x: torch.ones(6)[x.long()],
        lambda x: x.index_put_((torch.arange(2, device="cuda"),), torch.ones(2, 3)),
    ],
)
def test_tensors_on_host_and_device_do_not_mix(gpu, mix):
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        mix(grid(gpu))
    assert gpu.crossings == []


def test_the_host_s_generator_does_not_draw_on_the_device(gpu):
    with pytest.raises(RuntimeError, match="Expected a 'cuda' device type for generator"):
        torch.randn(2, device="cuda", generator=torch.Generator())


# Crossings


def some(x: Tensor) -> Tensor:
    """Indices on the device, made there."""
    return torch.arange(2, device=x.device)


@pytest.mark.parametrize(
    ("cross", "op"),
    [
        (lambda x: torch.ones(2, 3).to("cuda"), "_to_copy"),
        (lambda x: torch.ones(2, 3).cuda(), "_to_copy"),
        (lambda x: torch.ones(2, 3).to(x), "_to_copy"),
        (lambda x: torch.tensor([1, 2], device="cuda"), "_to_copy"),
        (lambda x: torch.as_tensor([1, 2], device="cuda"), "_to_copy"),
        (lambda x: x.new_tensor(3.0), "_to_copy"),
        (lambda x: x.copy_(torch.ones(3)), "copy_"),
        (lambda x: x[0].__setitem__(0, 1.0), "copy_"),
        (lambda x: x[[0, 1]], "_to_copy"),
        (lambda x: x[torch.tensor([0, 1])], "index"),
        (lambda x: x[torch.tensor([True, False])], "index"),
        (lambda x: x.__setitem__(some(x), 1.0), "index_put_"),
        (lambda x: x.index_put_((torch.arange(2),), x + 1), "index_put_"),
    ],
)
def test_host_to_device(gpu, cross, op):
    check_crossing(gpu, cross, [Crossing(TO_DEVICE, op)])


@pytest.mark.parametrize(
    ("cross", "op"),
    [
        (Tensor.cpu, "_to_copy"),
        (lambda x: x.to("cpu", torch.half), "_to_copy"),
        (lambda x: torch.ones(2, 3).copy_(x), "copy_"),
        (lambda x: x.tolist(), "_to_copy"),
        (lambda x: x.sum().item(), "_local_scalar_dense"),
        (lambda x: bool((x == x).all()), "_local_scalar_dense"),
        (lambda x: f"{float(x[0, 0]):.1f}", "_local_scalar_dense"),
        (torch.nonzero, "nonzero"),
        (lambda x: x.masked_select(x > 1), "masked_select"),
        (lambda x: x[x > 1], "index"),
        (lambda x: x.__setitem__(x > 1, x[0, 0]), "index_put_"),
        (lambda x: torch.equal(x, x), "equal"),
        (torch.unique, "_unique2"),
        (lambda x: F.one_hot(some(x)), "_local_scalar_dense"),
        (lambda x: x.repeat_interleave(some(x), dim=0), "repeat_interleave"),
    ],
)
def test_device_to_host(gpu, cross, op):
    check_crossing(gpu, cross, [Crossing(TO_HOST, op)])


def test_both_ways(gpu):
    def cross(x: Tensor) -> None:
        x.index_put_((x > 1,), torch.ones(()), accumulate=True)

    check_crossing(gpu, cross, [Crossing(TO_DEVICE, "index_put_"), Crossing(TO_HOST, "index_put_")])


def check_crossing(gpu: PretendGpu, cross: Callable[[Tensor], Any], crossings: list[Crossing]) -> None:
    x = grid(gpu)
    gpu.capturing = True
    with pytest.raises(RuntimeError, match=CAPTURE_FAILS):
        cross(x)
    gpu.capturing = False
    assert gpu.crossings == []
    assert torch.equal(gpu.host(x), torch.arange(6.0).view(2, 3))
    cross(x)
    assert gpu.crossings == crossings


@pytest.mark.parametrize(
    "stay",
    [
        lambda x: x.to("cuda") is x and x.cuda() is x and x.to(x.device) is x,
        lambda x: x.half().to("cuda", torch.double),
        lambda x: x.copy_(x + 1),
        lambda x: x.__setitem__(0, 1.0),
        lambda x: x.__setitem__(x > 1, 0.0),
        lambda x: x.masked_fill_(x > 1, 0.0),
        lambda x: x.mul_(torch.tensor(2.0)),
        lambda x: x[some(x)],
        lambda x: x.repeat_interleave(some(x), dim=0, output_size=1),
        lambda x: torch.quantile(x, 0.5),
        lambda x: torch.ones(3).nonzero().tolist() == [[0], [1], [2]],
    ],
)
def test_no_crossing(gpu, stay):
    gpu.capturing = True
    assert stay(grid(gpu)) is not False
    assert gpu.crossings == []


# The context


def test_nothing_is_left_behind():
    attention = ("aten::scaled_dot_product_attention", "AutogradCUDA")
    lazy_init, query = torch.cuda._lazy_init, torch.ones(1, 1, 2, 4)
    for _ in range(2):
        with PretendGpu() as gpu:
            x = grid(gpu).requires_grad_()
            F.scaled_dot_product_attention(*[query.cuda()] * 3)
            assert torch._C._dispatch_has_kernel_for_dispatch_key(*attention)
        assert gpu.crossings == [Crossing(TO_DEVICE, "_to_copy")]
    assert torch.cuda._lazy_init is lazy_init
    assert not torch._C._only_lift_cpu_tensors()
    assert not torch.__future__.get_swap_module_params_on_conversion()
    assert not torch._C._dispatch_has_kernel_for_dispatch_key(*attention)
    with pytest.raises(RuntimeError, match=r"aten\.add\.Tensor: got a pretend tensor, expected it only inside"):
        x + 1
    assert repr(x) == "PretendTensor(tensor([[0., 1., 2.],\n        [3., 4., 5.]]))"
    assert torch.equal(gpu.host(x), torch.arange(6.0).view(2, 3))


def test_a_mode_on_top_sees_the_device(gpu):
    with Log() as log:
        y = torch.ones(3).to("cuda") + torch.zeros(3, device="cuda")
        y[0].item()
        F.scaled_dot_product_attention(*[y.view(1, 1, 1, 3)] * 3)
    seen = [entry for entry in log.seen if entry[0] not in ("select", "view")]
    assert seen == [
        ("ones", None, "cpu"),
        ("_to_copy", "cpu", "cuda"),
        ("zeros", None, "cuda"),
        ("add", "cuda", "cuda"),
        ("_local_scalar_dense", "cuda", None),
        ("scaled_dot_product_attention", "cuda", "cuda"),
    ]
    assert gpu.crossings == [Crossing(TO_DEVICE, "_to_copy"), Crossing(TO_HOST, "_local_scalar_dense")]


def test_a_mode_on_top_does_not_see_the_tests_own_copies(gpu):
    module, given = nn.Linear(2, 2), torch.ones(2)
    module.table = given  # as `Module.to` does, `module` leaves it where it is
    with Log() as log:
        x = gpu.tensor(given)
        gpu.module(module)
        gpu.host(x)
        repr(x)
    assert log.seen == []


@torch.inference_mode()
def test_inference_mode(gpu):
    layer, x, query = nn.Linear(3, 2), torch.randn(4, 3), torch.randn(1, 2, 8, 16)
    got = gpu.module(layer)(gpu.tensor(x))
    assert torch.equal(gpu.host(got), layer(x))
    attended = F.scaled_dot_product_attention(*[gpu.tensor(query)] * 3)
    assert torch.equal(gpu.host(attended), F.scaled_dot_product_attention(query, query, query))
    assert gpu.crossings == []
    x.to("cuda").cpu()
    assert gpu.crossings == [Crossing(TO_DEVICE, "_to_copy"), Crossing(TO_HOST, "_to_copy")]


# Modules


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        self.second.weight = self.first.weight
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.register_buffer("offset", torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)) * self.frozen + self.offset


def check_tied(module: Tied) -> None:
    assert [type(tensor) for tensor in module.state_dict().values()] == [PretendTensor] * 4
    assert module.second.weight is module.first.weight
    assert [name for name, _ in module.named_parameters()] == ["frozen", "first.weight"]
    assert [parameter.requires_grad for parameter in module.parameters()] == [False, True]
    assert all(isinstance(parameter, nn.Parameter) for parameter in module.parameters())
    assert [name for name, _ in module.named_buffers()] == ["offset"]


def test_module(gpu):
    module, x = Tied(), torch.randn(3, 2)
    moved = gpu.module(module)
    check_tied(moved)
    assert gpu.crossings == []
    assert torch.equal(gpu.host(moved(gpu.tensor(x))), module(x))
    with torch.no_grad():
        moved.offset.zero_()
        moved.frozen.zero_()
    assert not gpu.host(moved(gpu.tensor(x))).any()
    assert module.offset.all()
    assert module.frozen.all()


@torch.no_grad()
def test_a_module_moves_itself(gpu):
    module, x = Tied(), torch.randn(3, 2)
    expected, frozen = module(x), module.frozen
    module.to("cuda")
    check_tied(module)
    assert module.frozen is frozen
    assert gpu.crossings == [Crossing(TO_DEVICE, "_to_copy")] * 3
    assert torch.equal(gpu.host(module(gpu.tensor(x))), expected)
    module.half()
    module.frozen.data = module.frozen.data.float()
    assert [tensor.dtype for tensor in module.parameters()] == [torch.float, torch.half]
    check_tied(module)
    assert len(gpu.crossings) == 3
    module.cpu().float()
    assert gpu.crossings[3:] == [Crossing(TO_HOST, "_to_copy")] * 3
    assert torch.allclose(module(x), expected, rtol=0, atol=3e-3)


def test_weights_are_loaded_from_the_host(gpu):
    source, moved = Tied(), gpu.module(Tied())
    moved.load_state_dict(source.state_dict())
    assert gpu.crossings == [Crossing(TO_DEVICE, "copy_")] * 4
    check_tied(moved)
    assert torch.equal(gpu.host(moved.first.weight), source.first.weight)


# Whole networks


def run(gpu: PretendGpu, model: nn.Module, **conditioning: Tensor) -> tuple[Tensor, list[Crossing]]:
    """What a network on the device returns, and its crossings."""
    x, times = gpu.tensor(randn(2, 3, 8, 8)), gpu.tensor(torch.tensor([3, 700]))
    on_device = {name: gpu.tensor(value) for name, value in conditioning.items()}
    before = len(gpu.crossings)
    with torch.no_grad():
        output = model(x, times, **on_device)
    return gpu.host(output), gpu.crossings[before:]


def run_on_cpu(model: nn.Module, **conditioning: Tensor) -> Tensor:
    with torch.no_grad():
        output = model(randn(2, 3, 8, 8), torch.tensor([3, 700]), **conditioning)
    assert output.std() > 0.05
    return output


@pytest.mark.parametrize(
    ("build", "conditioning"),
    [
        (lambda: unet(UNetModel, num_classes=10), {"y": CLASSES}),
        (lambda: unet(UNetModel, resblock_updown=True, use_scale_shift_norm=True, num_head_channels=16), {}),
        (lambda: unet(EncoderUNetModel, pool="attention", num_head_channels=32), {}),
        (lambda: text_unet(Text2ImUNet), TOKENS),
        (lambda: text_unet(SuperResText2ImUNet), {**TOKENS, "low_res": randn(2, 3, 4, 4)}),
    ],
)
def test_our_networks_cross_nothing(build, conditioning):
    model = build()
    expected = run_on_cpu(model, **conditioning)
    with PretendGpu() as gpu:
        gpu.capturing = True
        output, crossings = run(gpu, gpu.module(model), **conditioning)
    assert torch.equal(output, expected)
    assert crossings == []


def test_the_originals_embedding_copies_from_the_host_in_every_call(gpu):
    timesteps = torch.tensor([0, 3, 700])
    on_device, expected = gpu.tensor(timesteps), embed_as_the_originals(timesteps, 32)
    assert gpu.crossings == []
    for calls in (1, 2):
        assert torch.equal(gpu.host(embed_as_the_originals(on_device, 32)), expected)
        assert gpu.crossings == [EMBEDDING] * calls
    gpu.capturing = True
    with pytest.raises(RuntimeError, match=CAPTURE_FAILS):
        embed_as_the_originals(on_device, 32)


# The originals' networks


def check_crosses_once(model: nn.Module, **conditioning: Tensor) -> None:
    expected = run_on_cpu(model, **conditioning)
    with PretendGpu() as gpu:
        moved = gpu.module(model)
        for _ in range(2):
            output, crossings = run(gpu, moved, **conditioning)
            assert torch.equal(output, expected)
            assert crossings == [EMBEDDING]
        gpu.capturing = True
        with pytest.raises(RuntimeError, match=CAPTURE_FAILS):
            run(gpu, moved, **conditioning)


@pytest.mark.parametrize(
    ("kind", "options", "conditioning"),
    [
        ("UNetModel", {"num_classes": 10}, {"y": CLASSES}),
        ("UNetModel", {"resblock_updown": True, "use_scale_shift_norm": True, "use_fp16": True}, {}),
        ("SuperResModel", {}, {"low_res": randn(2, 3, 4, 4)}),
        ("EncoderUNetModel", {"pool": "attention", "num_head_channels": 32}, {}),
    ],
)
def test_guided_diffusion(kind, options, conditioning):
    module = pytest.importorskip("guided_diffusion.unet", reason="guided-diffusion is not on the path")
    model = unet(getattr(module, kind), **options)
    if "use_fp16" in options:
        model.convert_to_fp16()
    check_crosses_once(model, **conditioning)


@pytest.mark.parametrize(
    ("kind", "conditioning"),
    [
        ("Text2ImUNet", {}),
        ("SuperResText2ImUNet", {"low_res": randn(2, 3, 4, 4)}),
        ("InpaintText2ImUNet", {"inpaint_image": randn(2, 3, 8, 8), "inpaint_mask": torch.ones(2, 1, 8, 8)}),
    ],
)
def test_glide(kind, conditioning):
    module = pytest.importorskip("glide_text2im.text2im_model", reason="glide-text2im is not on the path")
    check_crosses_once(text_unet(getattr(module, kind)), **TOKENS, **conditioning)


def test_glide_compares_text_with_its_cache():
    module = pytest.importorskip("glide_text2im.text2im_model", reason="glide-text2im is not on the path")
    model = text_unet(module.Text2ImUNet, cache_text_emb=True)
    expected = run_on_cpu(model, **TOKENS)
    model.del_cache()
    with PretendGpu() as gpu:
        moved = gpu.module(model)
        for expected_crossings in ([EMBEDDING], [EMBEDDING, Crossing(TO_HOST, "_local_scalar_dense")]):
            output, crossings = run(gpu, moved, **TOKENS)
            assert torch.equal(output, expected)
            assert crossings == expected_crossings
