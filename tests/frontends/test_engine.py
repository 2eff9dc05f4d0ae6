"""What the drop-ins' loops do beyond the originals: guidance recognised, noise chosen, samplers kept, errors named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.golden_data import guided, toy
from torch import Tensor, nn

from fastcfg import ClassifierFree, Sampler
from fastcfg.engine import program_cache as keeper
from fastcfg.engine.noise import _fill_and_skip, cuda_normal_offset, torch_source
from fastcfg.frontends import accelerate, glide, guided_diffusion
from fastcfg.reference.philox import INITIAL_STREAM, philox_normal, sample_seeds

pytestmark = pytest.mark.quick

SHAPE = (4, 3, 4, 4)
Y = torch.tensor([1.0, 2.5, 0.0, 0.0])
KWARGS: dict[str, Any] = {"model_kwargs": {"y": Y}, "device": "cpu"}


@pytest.fixture
def diffusion() -> glide.SpacedDiffusion:
    return glide.create_gaussian_diffusion(1000, "squaredcos_cap_v2", "5")


def count_batches(sizes: list[int]) -> Any:
    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        sizes.append(len(x))
        return toy(x, t, y)

    return model


def test_classifier_free_is_the_notebooks_function() -> None:
    x, t = torch.randn(SHAPE), torch.tensor([7, 7, 7, 7])
    assert torch.equal(ClassifierFree(toy, 3.0)(x, t, y=Y), guided(toy, 3.0)(x, t, y=Y))
    with_extra = ClassifierFree(lambda x, t, y: (toy(x, t, y), "extra"), 3.0)
    assert torch.equal(with_extra(x, t, y=Y), guided(toy, 3.0)(x, t, y=Y))


def test_the_engine_keeps_one_sample_of_each_pair(diffusion: glide.SpacedDiffusion, monkeypatch: Any) -> None:
    shapes: list[Any] = []
    run = Sampler.sample
    monkeypatch.setattr(
        Sampler, "sample", lambda self, **options: shapes.append(options["shape"]) or run(self, **options)
    )
    sizes: list[int] = []
    samples = diffusion.p_sample_loop(ClassifierFree(count_batches(sizes), 3.0), SHAPE, **KWARGS)
    assert shapes == [(2, 3, 4, 4)]
    assert sizes == [4] * 5
    assert samples.shape == SHAPE
    # Scale 0 and 1 need one branch alone, but at 0 the conditional one still says the variance.
    sizes.clear()
    diffusion.p_sample_loop(ClassifierFree(count_batches(sizes), 1.0), SHAPE, **KWARGS)
    assert sizes == [2] * 5


def test_samplers_and_programs_are_kept(diffusion: glide.SpacedDiffusion, monkeypatch: Any) -> None:
    built: list[Any] = []
    build = keeper.Programs
    monkeypatch.setattr(keeper, "Programs", lambda *arguments: built.append(arguments) or build(*arguments))

    def denoised_fn(x0: Tensor) -> Tensor:
        return 0.5 * x0

    for scale in (2.0, 3.0):
        model_fn = ClassifierFree(toy, scale)
        for labels in (Y, Y + 1):
            diffusion.p_sample_loop(model_fn, SHAPE, denoised_fn=denoised_fn, model_kwargs={"y": labels}, device="cpu")
    assert len(built) == 1
    diffusion.ddim_sample_loop(model_fn, SHAPE, **KWARGS)
    assert len(built) == 2


def test_seeds(diffusion: glide.SpacedDiffusion) -> None:
    model = guided(toy, 2.0)
    torch.manual_seed(5)
    want = diffusion.p_sample_loop(model, SHAPE, **KWARGS)
    state = torch.get_rng_state()
    assert torch.equal(diffusion.p_sample_loop(model, SHAPE, **KWARGS, seed=5), want)
    assert torch.equal(torch.get_rng_state(), state), "a seed of one's own moved the global generator"
    reference = diffusion.p_sample_loop(model, SHAPE, **KWARGS, seed=5, backend="reference")
    torch.testing.assert_close(reference, want, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"seed: got .* expected one integer"):
        diffusion.p_sample_loop(model, SHAPE, **KWARGS, seed=[1, 2, 3, 4])


def test_philox_noise_makes_a_sample_depend_on_its_seed_alone(diffusion: glide.SpacedDiffusion) -> None:
    options: dict[str, Any] = {"noise_source": "philox", "device": "cpu"}
    pair = diffusion.p_sample_loop(ClassifierFree(toy, 2.0), SHAPE, model_kwargs={"y": Y}, seed=[8, 9], **options)
    one = diffusion.p_sample_loop(
        ClassifierFree(toy, 2.0), (2, 3, 4, 4), model_kwargs={"y": Y[1::2]}, seed=9, **options
    )
    torch.testing.assert_close(one[0], pair[1], rtol=0, atol=1e-6)
    first = next(diffusion.ddim_sample_loop_progressive(lambda x, t: torch.cat([x, x], 1), SHAPE, seed=3, **options))
    assert first["sample"].shape == SHAPE
    assert philox_normal(sample_seeds(3, 4), SHAPE[1:], stream=INITIAL_STREAM).shape == SHAPE


def test_recorded_noise_is_asked_for_by_step_and_whole_shape(diffusion: glide.SpacedDiffusion) -> None:
    asked: list[Any] = []

    def source(step: int, shape: tuple[int, ...]) -> Tensor:
        asked.append((step, shape))
        return torch.full(shape, 0.1 * step)

    start = torch.zeros(SHAPE)
    results = [
        diffusion.p_sample_loop(model, SHAPE, noise=start, noise_source=source, backend=backend, **KWARGS)
        for model, backend in ((ClassifierFree(toy, 2.0), "auto"), (guided(toy, 2.0), "reference"))
    ]
    assert asked == [(step, SHAPE) for step in range(5)] * 2
    torch.testing.assert_close(results[0][:2], results[1][:2], rtol=0, atol=1e-5)


def test_keywords_that_have_no_row_per_sample_are_passed_as_they_are(diffusion: glide.SpacedDiffusion) -> None:
    table = torch.linspace(0, 1, 7)

    def model(x: Tensor, t: Tensor, y: Tensor, table: Tensor, name: str, none: None) -> Tensor:
        assert table.shape == (7,)
        assert name == "x"
        assert none is None
        return toy(x, t, y + table[3])

    kwargs = {"y": Y, "table": table, "name": "x", "none": None}
    for guide in (guided, ClassifierFree):
        diffusion.p_sample_loop(guide(model, 2.0), SHAPE, model_kwargs=kwargs, device="cpu")


def test_a_progress_bar_is_shown_if_asked_for(diffusion: glide.SpacedDiffusion, capsys: Any) -> None:
    for backend in ("auto", "reference"):
        for loop in (diffusion.p_sample_loop, diffusion.ddim_sample_loop_progressive):
            list(loop(guided(toy, 2.0), SHAPE, **KWARGS, progress=True, backend=backend))
            assert "5/5" in capsys.readouterr().err


def test_the_device_is_the_parameters(diffusion: glide.SpacedDiffusion) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1, 6, 1, 1))

        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            return toy(x, t, y) * self.weight

    model = Model()
    assert next(ClassifierFree(model, 1.0).parameters()) is model.weight
    for wrapped in (model, ClassifierFree(model, 2.0)):
        samples = diffusion.p_sample_loop(wrapped, list(SHAPE), model_kwargs={"y": Y})
        assert not samples.requires_grad


def test_the_captured_loop_is_the_eager_one(diffusion: glide.SpacedDiffusion) -> None:
    for model in (guided(toy, 2.0), ClassifierFree(toy, 2.0)):
        results = [diffusion.p_sample_loop(model, SHAPE, **KWARGS, seed=1, graph=graph) for graph in (False, True)]
        assert torch.equal(*results)


def test_low_precision_and_double_starts(diffusion: glide.SpacedDiffusion) -> None:
    start = torch.randn(SHAPE).half()
    for dtype, expected in ((torch.float16, torch.float32), (torch.float64, torch.float64)):
        for backend in ("auto", "reference"):
            got = diffusion.ddim_sample_loop(guided(toy, 2.0), SHAPE, noise=start.to(dtype), backend=backend, **KWARGS)
            assert got.dtype == expected


def test_previous_x_with_denoised_fn_changes_only_what_is_reported() -> None:
    diffusion = guided_diffusion.GaussianDiffusion(
        betas=guided_diffusion.get_named_beta_schedule("cosine", 6),
        model_mean_type=guided_diffusion.ModelMeanType.PREVIOUS_X,
        model_var_type=guided_diffusion.ModelVarType.FIXED_SMALL,
        loss_type=guided_diffusion.LossType.MSE,
    )

    def model(x: Tensor, t: Tensor) -> Tensor:
        return 0.9 * x

    plain = list(diffusion.p_sample_loop_progressive(model, SHAPE, device="cpu", seed=1))
    changed = list(
        diffusion.p_sample_loop_progressive(model, SHAPE, device="cpu", seed=1, denoised_fn=torch.zeros_like)
    )
    torch.testing.assert_close(changed[-1]["sample"], plain[-1]["sample"], rtol=0, atol=1e-6)
    assert not changed[0]["pred_xstart"].any()


def test_the_reverse_ode_draws_nothing(diffusion: glide.SpacedDiffusion) -> None:
    x = torch.linspace(-1, 1, 192).view(SHAPE)
    state = torch.get_rng_state()
    want = diffusion.ddim_reverse_sample_loop(guided(toy, 2.0), x, model_kwargs={"y": Y}, backend="reference")
    for model in (guided(toy, 2.0), ClassifierFree(toy, 2.0)):
        got = diffusion.ddim_reverse_sample_loop(model, x, model_kwargs={"y": Y})
        torch.testing.assert_close(got[:2], want[:2], rtol=0, atol=5e-5)
    assert torch.equal(torch.get_rng_state(), state)


# torch's CUDA kernel: 256 threads a block, 8 blocks on each of 132 multiprocessors, four values a thread and draw.
@pytest.mark.parametrize(
    ("numel", "offset"),
    [(1, 4), (256, 4), (270336, 4), (270337, 4), (4 * 270336, 4), (4 * 270336 + 1, 8), (9 * 270336, 12)],
)
def test_how_far_a_draw_moves_a_cuda_generator(numel: int, offset: int) -> None:
    assert cuda_normal_offset(numel, 132) == offset


def test_an_unused_draw_only_moves_a_cuda_generator() -> None:
    class Generator:
        offset = 8

        def get_offset(self) -> int:
            return self.offset

        def set_offset(self, offset: int) -> None:
            self.offset = offset

    generator = Generator()
    for row in range(2):
        _fill_and_skip(row, None, skip=12, generator=generator)  # type: ignore[arg-type]
    assert generator.offset == 32


def test_the_generator_moves_where_nothing_is_used() -> None:
    source = torch_source(3, (2, 3, 4, 4), torch.device("cpu"), drawn=4, every_row=True)
    generator = torch.Generator().manual_seed(3)
    want = torch.randn(4, 3, 4, 4, generator=generator)
    assert torch.equal(source.start(), want[:2])
    source.fill(0, None)  # type: ignore[misc]
    torch.randn(4, 3, 4, 4, generator=generator)
    buffer = torch.empty(2, 3, 4, 4)
    source.fill(1, buffer)  # type: ignore[misc]
    assert torch.equal(buffer, torch.randn(4, 3, 4, 4, generator=generator)[:2])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"shape": (3, 3, 4, 4)}, ValueError, "shape: got a batch of 3, expected an even one"),
        ({"shape": "4344"}, TypeError, "shape: got str, expected a tuple or a list"),
        ({"noise": torch.zeros(2, 3, 4, 4)}, ValueError, r"noise: got shape \(2, 3, 4, 4\), expected \(4, 3, 4, 4\)"),
        ({"noise_source": "numpy"}, ValueError, "noise_source: got 'numpy', expected 'torch', 'philox' or a function"),
        ({"noise_source": "philox", "backend": "reference"}, ValueError, "noise_source: got 'philox' with backend="),
        ({"backend": "cuda"}, ValueError, "backend: got 'cuda', expected one of"),
        ({"guidance": 3.0}, TypeError, "sampling loop: got unexpected guidance, expected"),
        ({"noise_source": lambda step, shape: torch.zeros(1)}, ValueError, r"noise_source\(0\): got shape \(1,\)"),
        ({"model": ClassifierFree(lambda x, t, y: x, 2.0)}, ValueError, r"model output: got shape \(4, 3, 4, 4\)"),
        ({"model": lambda x, t, y: x}, ValueError, r"model output: got shape \(4, 3, 4, 4\), expected \(4, 6, 4, 4\)"),
    ],
)
def test_bad_arguments_are_named(
    diffusion: glide.SpacedDiffusion, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {"model": ClassifierFree(toy, 2.0), "shape": SHAPE, **KWARGS, **options}
    with pytest.raises(error, match=message):
        diffusion.p_sample_loop(**arguments)


def test_bad_objects_are_named(diffusion: glide.SpacedDiffusion) -> None:
    with pytest.raises(TypeError, match="obj: got Linear, expected a diffusion of guided-diffusion's form"):
        accelerate(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="model: got int, expected a callable"):
        ClassifierFree(3, 2.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="guidance_scale: got nan, expected a finite number"):
        ClassifierFree(toy, float("nan"))
    with pytest.raises(ValueError, match="x_t: got a batch of 3, expected an even one"):
        ClassifierFree(toy, 2.0)(torch.zeros(3, 3, 4, 4), torch.zeros(3), y=Y[:3])
    with pytest.raises(ValueError, match=r"t: got shape \(1,\), expected \(4,\)"):
        diffusion.p_sample(toy, torch.zeros(SHAPE), torch.tensor([0]), model_kwargs={"y": Y})
    with pytest.raises(TypeError, match="model_kwargs: got None with a cond_fn"):
        diffusion.p_sample(
            lambda x, t: torch.cat([x, x], 1), torch.zeros(SHAPE), torch.tensor([0] * 4), cond_fn=lambda x, t: x
        )
    with pytest.raises(AssertionError, match=r"eta: got 0\.5, expected 0"):
        diffusion.ddim_reverse_sample(toy, torch.zeros(SHAPE), torch.tensor([0] * 4), eta=0.5)
    with pytest.raises(ValueError, match=r"path: got 'base', which is not a file \(fastcfg downloads nothing\)"):
        glide.load_checkpoint("base")
    options = glide.model_and_diffusion_defaults()
    del options["image_size"]
    with pytest.raises(TypeError, match="options: got image_size missing or unknown"):
        glide.create_model_and_diffusion(**options)
    with pytest.raises(TypeError, match="options: got nonsense missing or unknown"):
        guided_diffusion.create_model_and_diffusion(**guided_diffusion.model_and_diffusion_defaults(), nonsense=1)
