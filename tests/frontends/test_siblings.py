"""Samplers of other projects, accelerated as they are called: beside themselves, or as the original, said so."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from support import ROOT, siblings
from torch import Tensor, nn

import fastcfg

pytestmark = pytest.mark.quick

NET = siblings.Network()
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([1.0, 3.0])
COND = torch.randn(2, 5, generator=torch.Generator().manual_seed(1))
UNCOND = torch.zeros(2, 5)
T = torch.full((2,), 0.5)
STEPS = torch.linspace(1, 0, 7)[:-1]
GUIDED = {"unconditional_guidance_scale": 5.0, "unconditional_conditioning": UNCOND}
SIZE = (3, 8, 8)


def denoiser(x: Tensor, sigma: Tensor, c: Mapping[str, Tensor]) -> Tensor:
    return NET(x, sigma, c["vector"])  # type: ignore[no-any-return]


def with_x(sample: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Samples, and what is left of x."""
    return sample(denoiser, x, *VECTORS), x


def consistency(x: Tensor, sigma: Tensor) -> Tensor:
    return siblings.KarrasDenoiser().denoise(NET, x, sigma)[1].clamp(-1, 1)


def with_keywords(x: Tensor, t: Tensor, **extras: Any) -> Tensor:
    return NET(x, t, **extras)  # type: ignore[no-any-return]


def stacked() -> Any:
    return siblings.StackedRandomGenerator([4, 5]).randn_like


TRANSPORT, PROCESS = siblings.Transport(), siblings.NoiseScheduleVP()
DUMMY, KARRAS = siblings.DummyGenerator(), torch.tensor([80.0, 20.0, 3.0, 0.2, 0.0])
TWICE = {"y": torch.cat([Y, 0 * Y]), "cfg_scale": 2.0}
VECTORS = {"vector": COND}, {"vector": UNCOND}
FLUX = X.flatten(2), X[:, :1], X[:, 0], COND, [1.0, 0.7, 0.3, 0.0]

# A function, and how its project calls it.
FUNCTIONS: dict[str, tuple[Any, Callable[[Any], Any]]] = {
    "EDM": (siblings.edm_sampler, lambda f: f(NET, X, Y)),
    "EDM with churn": (siblings.edm_sampler, lambda f: f(NET, X, Y, S_churn=3)),
    "EDM, noise given": (siblings.edm_sampler, lambda f: f(NET, X, None, torch.randn_like, S_churn=3)),
    "EDM, a seed for each": (siblings.edm_sampler, lambda f: f(NET, X, None, stacked(), S_churn=3)),
    "EDM2, a seed for each": (siblings.edm2_sampler, lambda f: f(NET, X, Y, S_churn=3, randn_like=stacked())),
    "EDM2": (siblings.edm2_sampler, lambda f: f(NET, X, Y)),
    "EDM2 with churn": (siblings.edm2_sampler, lambda f: f(NET, X, Y, S_churn=3)),
    "SiT ODE": (TRANSPORT.sample_ode(), lambda f: f(X, NET, y=Y)),
    "SiT midpoint": (TRANSPORT.sample_ode("midpoint"), lambda f: f(X, NET, y=Y)[-1]),
    "SiT guided": (TRANSPORT.sample_ode(), lambda f: f(torch.cat([X, X]), NET.forward_with_cfg, **TWICE)),
    "SiT SDE": (TRANSPORT.sample_sde(), lambda f: f(X, NET, y=Y)),
    "REPA": (siblings.repa_euler, lambda f: f(siblings.repa_network, X, Y)),
    "REPA Heun": (siblings.repa_euler, lambda f: f(siblings.repa_network, X, Y, heun=True)),
    "REPA guided": (siblings.repa_euler, lambda f: f(siblings.repa_network, X, Y, cfg_scale=2.0)),
    "REPA SDE": (siblings.repa_euler_maruyama, lambda f: f(siblings.repa_network, X, Y)),
    "REPA SDE guided": (siblings.repa_euler_maruyama, lambda f: f(siblings.repa_network, X, Y, cfg_scale=2.0)),
    "Flux": (siblings.flux_denoise, lambda f: f(siblings.flux_model, *FLUX)),
    "consistency models": (siblings.sample_karras_heun, lambda f: f(consistency, 80 * X, KARRAS, DUMMY)),
    "consistency, churn": (siblings.sample_karras_heun, lambda f: f(consistency, 80 * X, KARRAS, DUMMY, s_churn=2.0)),
    "stable-audio": (siblings.sample_audio, lambda f: f(NET, X.flatten(2), 6, 0.0)),
    "stable-audio, eta": (siblings.sample_audio, lambda f: f(NET, X.flatten(2), 6, 1.0, y=Y)),
    "stable-audio flow": (siblings.sample_rectified_flow, lambda f: f(NET, X.flatten(2), 6)),
    "flow, sigmas": (siblings.sample_rectified_flow, lambda f: f(NET, X, sigmas=torch.tensor([1.0, 0.4, 0.0]), y=Y)),
    "v-diffusion": (siblings.v_sample, lambda f: f(NET, X, STEPS, 0.0, {"y": Y})),
    "v-diffusion, eta": (siblings.v_sample, lambda f: f(NET, X, STEPS, 1.0, {})),
    "sgm": (siblings.EDMSampler(), lambda f: with_x(f, X.clone())),
    "sgm with churn": (siblings.EDMSampler(s_churn=3.0), lambda f: with_x(f, X.clone())),
}


def solver(kind: Any = siblings.DPM_Solver, *guidance: Any, **options: Any) -> Any:
    return kind(siblings.model_wrapper(NET, PROCESS, *guidance), PROCESS, **options)


def sampler(kind: Any = siblings.DDIMSampler) -> Any:
    return kind(siblings.LatentDiffusion())


OBJECTS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "DPM-Solver": (solver, lambda o: o.sample(X)),
    "DPM-Solver guided": (lambda: solver(siblings.DPM_Solver, COND, UNCOND, 3.0), lambda o: o.sample(X, steps=5)),
    "DPM-Solver, all": (solver, lambda o: o.sample(X, return_intermediate=True)),
    "UniPC": (lambda: solver(siblings.UniPC), lambda o: o.sample(X)),
    "flow_matching": (lambda: siblings.ODESolver(with_keywords), lambda o: o.sample(x_init=X, step_size=0.2)),
    "flow_matching, all": (
        lambda: siblings.ODESolver(with_keywords),
        lambda o: o.sample(X, 0.2, return_intermediates=True, y=Y),
    ),
    "CompVis DDIM": (sampler, lambda o: o.sample(5, 2, SIZE, COND)),
    "CompVis DDIM, eta": (sampler, lambda o: o.sample(5, 2, SIZE, COND, eta=1.0, x_T=X, log_every_t=2)),
    "CompVis DDIM guided": (sampler, lambda o: o.sample(5, 2, SIZE, COND, **GUIDED)),
    "CompVis PLMS": (lambda: sampler(siblings.PLMSSampler), lambda o: o.sample(5, 2, SIZE, COND)),
    "CompVis PLMS guided": (lambda: sampler(siblings.PLMSSampler), lambda o: o.sample(6, 2, SIZE, COND, **GUIDED)),
    "CompVis LatentDiffusion": (siblings.LatentDiffusion, lambda o: o.p_sample_loop(COND, (2, 3, 8, 8), 9)),
    "lucidrains": (lambda: siblings.DenoisingDiffusion(NET), lambda o: o.sample(2)),
    "lucidrains, eps": (lambda: siblings.DenoisingDiffusion(NET, objective="pred_noise"), lambda o: o.sample(2)),
    "lucidrains, x0, all": (
        lambda: siblings.DenoisingDiffusion(NET, objective="pred_x0"),
        lambda o: o.sample(3, return_all_timesteps=True),
    ),
    "lucidrains DDIM": (lambda: siblings.DenoisingDiffusion(NET, sampling_timesteps=5), lambda o: o.sample(2)),
    "lucidrains DDIM, eta": (
        lambda: siblings.DenoisingDiffusion(NET, sampling_timesteps=5, ddim_sampling_eta=0.7),
        lambda o: o.ddim_sample((2, 3, 6, 6)),
    ),
}


def compare(want: Any, got: Any) -> None:
    """The same structure, and tensors as far apart as float32 allows."""
    assert type(got) is type(want)
    if isinstance(want, Tensor):
        assert (got.dtype, got.shape) == (want.dtype, want.shape)
        assert float((got - want).abs().max()) <= 2e-5 * max(1.0, float(want.abs().max()))
    elif isinstance(want, dict):
        assert list(got) == list(want)
        compare(list(want.values()), list(got.values()))
    elif isinstance(want, list | tuple):
        assert len(got) == len(want)
        for a, b in zip(want, got, strict=True):
            compare(a, b)
    else:
        assert got == want


def ran(each: Any, call: Callable[[Any], Any]) -> tuple[Any, bytes, str]:
    """What a call returns and prints, and where it leaves the generator."""
    torch.manual_seed(5)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), torch.no_grad():
        result = call(each)
    return result, torch.get_rng_state().numpy().tobytes(), printed.getvalue()


def beside(original: Any, ours: Any, call: Callable[[Any], Any], runs: tuple[str, ...] = ("stepped", "engine")) -> None:
    for _ in range(2):
        want, got = ran(original, call), ran(ours, call)
        compare(want[0], got[0])
        assert got[1:] == want[1:]
        assert fastcfg.report(ours)["run"] in runs


def clamped(model: Any, x: Tensor) -> Tensor:
    for _ in range(3):
        x = (x + 0.5 * model(x, T)).clamp(-1, 1)
    return x


FUNCTIONS["x clamped in every step"] = clamped, lambda f: f(NET, X)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name: str) -> None:
    function, call = FUNCTIONS[name]
    beside(function, fastcfg.accelerate(function), call)


@pytest.mark.parametrize("name", OBJECTS)
def test_objects(name: str) -> None:
    make, call = OBJECTS[name]
    original = make()
    ours = fastcfg.accelerate(original)
    assert isinstance(ours, type(original))
    assert fastcfg.is_fused(ours)
    beside(original, ours, call)
    assert vars(ours).keys() == vars(original).keys()
    beside(original, copy.copy(ours), call)


def test_an_object_is_pickled_and_keeps_what_is_its_own() -> None:
    ours = fastcfg.accelerate(sampler())
    again = pickle.loads(pickle.dumps(ours))
    beside(sampler(), again, lambda o: o.sample(5, 2, SIZE, COND))


def test_what_changes_of_an_object_is_heard() -> None:
    pairs = [(make(), fastcfg.accelerate(make())) for make in (sampler, solver, lambda: siblings.ODESolver(NET))]
    calls = lambda o: o.sample(5, 2, SIZE, COND), lambda o: o.sample(X), lambda o: o.sample(X, 0.2)
    pairs[1][1].noise_schedule = siblings.NoiseScheduleVP()
    for turn in range(3):
        for pair, call in zip(pairs, calls, strict=True):
            for _ in range(2):
                beside(*pair, call)
        for each in (0, 1):
            pairs[0][each].model.alphas_cumprod.mul_(0.9)
            pairs[1][each].noise_schedule.T = 0.9 - 0.1 * turn
            pairs[2][each].velocity_model = siblings.Network()
            pairs[2][each].velocity_model.weight.data.mul_(1.1 + turn)


@pytest.mark.parametrize("sample", [siblings.sample_audio, siblings.v_sample])
def test_callbacks_are_given_what_the_original_gives(sample: Any) -> None:
    """Sums of a row's x and output, which the engine does not keep."""
    arguments = (6, 0.0) if sample is siblings.sample_audio else (STEPS, 0.0, {})
    found = []
    for each in (sample, fastcfg.accelerate(sample)):
        told: list[Any] = []
        for _ in range(2):
            compare(
                sample(NET, X, *arguments),
                each(NET, X, *arguments, callback=lambda info, told=told: told.append({**info})),
            )
        found.append(told)
    compare(*found)
    assert len(found[0]) == 12


def test_a_callback_that_changes_a_sum_is_heard() -> None:
    def edit(info: dict[str, Any]) -> None:
        if info["i"] == 2:
            info["pred"].mul_(0.5)

    call = lambda f: f(NET, X, STEPS, 0.0, {}, edit)  # noqa: E731
    beside(siblings.v_sample, fastcfg.accelerate(siblings.v_sample), call, ("stepped, then the original",))


class Unlike:
    """A sampling function whose model is given, or whose samples are, what no table has."""

    def hands_on_its_samples(self, model: Any, x: Tensor) -> Tensor:
        return x + model(x, T, x * 2)  # type: ignore[no-any-return]

    def by_way_of_numpy(self, model: Any, x: Tensor) -> Tensor:
        return x + model(x, T, torch.from_numpy(x.mean(dim=(1, 2, 3)).numpy().copy()))  # type: ignore[no-any-return]

    def by_way_of_numbers(self, model: Any, x: Tensor) -> Tensor:
        return x + model(x, T, float(x.std()) * Y)  # type: ignore[no-any-return]

    def blends_by_step_and_uses_one(self, model: Any, x: Tensor) -> Tensor:
        a, b = model(torch.cat([x, x]), torch.cat([T, T])).chunk(2)
        x = x + a + b
        return x + model(x + a, T)  # type: ignore[no-any-return]

    def difference_of_branches(self, model: Any, x: Tensor) -> Tensor:
        a, b = model(torch.cat([x, x]), torch.cat([T, T]), torch.cat([Y, 2 * Y])).chunk(2)
        return x + (a - b)  # type: ignore[no-any-return]

    def unlike_branches(self, model: Any, x: Tensor) -> Tensor:
        a, b = model(torch.cat([x, 2 * x]), torch.cat([T, T])).chunk(2)
        return x + a + b  # type: ignore[no-any-return]

    def clamps_in_one_step(self, model: Any, x: Tensor) -> Tensor:
        x = x + model(x, T).clamp(-0.5, 0.5)
        return x + model(x, T)  # type: ignore[no-any-return]

    def clamps_its_samples_too(self, model: Any, x: Tensor) -> Tensor:
        for _ in range(3):
            x = (0.2 * x + 0.5 * (x + 0.5 * model(x, T)).clamp(-1, 1)).clamp(-1, 1)
        return x

    def clamps_to_two_bounds(self, model: Any, x: Tensor) -> Tensor:
        for bound in (2.0, 1.0):
            x = (x + 0.5 * model(x, T)).clamp(-bound, bound)
        return x

    def clamps_beside(self, model: Any, x: Tensor) -> Tensor:
        for _ in range(3):
            out = model(x, T)
            x = 0.9 * x + 0.1 * (x - out).clamp(-1, 1) + 0.2 * out
        return x

    def clamps_to_one_side(self, model: Any, x: Tensor) -> Tensor:
        return x + model(x, T).clamp(min=-0.1)  # type: ignore[no-any-return]

    def adds_a_tensor(self, model: Any, x: Tensor) -> Tensor:
        return x + model(x, T) + Y.view(-1, 1, 1, 1)  # type: ignore[no-any-return]

    def adds_a_number_in_its_steps(self, model: Any, x: Tensor) -> Tensor:
        x = x + model(x, T) + 1
        return x + model(x, T)  # type: ignore[no-any-return]

    def prints_its_samples(self, model: Any, x: Tensor) -> Tensor:
        print(f"{float(x.std()):.6f}")
        return x + model(x, T)  # type: ignore[no-any-return]

    def returns_its_size(self, model: Any, x: Tensor) -> tuple[Tensor, float]:
        return x + model(x, T), float(x.std())

    def returns_a_square(self, model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        return x + model(x, T), x**2


@pytest.mark.parametrize("name", [name for name in vars(Unlike) if not name.startswith("_")])
def test_what_no_table_has_runs_as_the_original(name: str) -> None:
    function = getattr(Unlike(), name)
    beside(function, fastcfg.accelerate(function), lambda f: f(NET, X), ("the original",))


def test_arguments_are_not_written_into_on_stand_ins() -> None:
    def writes(model: Any, x: Tensor, labels: Tensor) -> Tensor:
        labels += 1
        return x + model(x, labels)  # type: ignore[no-any-return]

    labels = Y.clone()
    fastcfg.accelerate(writes)(NET, X, labels)
    assert torch.equal(labels, Y + 1)


def test_conditioning_is_that_of_the_call() -> None:
    ours = fastcfg.accelerate(siblings.repa_euler)
    for labels in (Y, Y + 1, torch.tensor([7.0, 8.0])):
        beside(siblings.repa_euler, ours, lambda f, y=labels: f(siblings.repa_network, X, y, cfg_scale=2.0))


class Reading:
    """Functions whose steps depend on their tensors' values, in ways of which some show in no operation."""

    def branches(self, model: Any, x: Tensor, labels: Tensor) -> Tensor:
        return x + (2.0 if labels.sum() > 5 else 1.0) * model(x, T, labels)  # type: ignore[no-any-return]

    def by_numpy(self, model: Any, x: Tensor, labels: Tensor) -> Tensor:
        return x + float(labels.numpy().sum()) * model(x, T, labels)  # type: ignore[no-any-return]

    def by_a_list(self, model: Any, x: Tensor, labels: Tensor) -> Tensor:
        return x + labels.tolist()[0][0] * model(x, T, labels)  # type: ignore[no-any-return]

    def by_format(self, model: Any, x: Tensor, labels: Tensor) -> Tensor:
        return x + float(f"{labels[0, 0]:.2f}") * model(x, T, labels)  # type: ignore[no-any-return]

    def by_comparison(self, model: Any, x: Tensor, labels: Tensor) -> Tensor:
        return x + (2.0 if torch.equal(labels, Y.view(2, 1)) else 1.0) * model(x, T, labels)  # type: ignore[no-any-return]

    def scales(self, model: Any, x: Tensor, labels: Tensor) -> Tensor:
        return x + labels[0] * model(x, T, labels)  # type: ignore[no-any-return]

    def gives_times(self, model: Any, x: Tensor, labels: Tensor) -> Tensor:
        return x + model(x, labels[0].expand(len(x)).clone(), labels)  # type: ignore[no-any-return]

    def fills(self, model: Any, x: Tensor, labels: Tensor) -> Tensor:
        made = torch.zeros(2, 1)
        made += labels
        return x + model(x, T, made)  # type: ignore[no-any-return]

    def counts(self, model: Any, x: Tensor, labels: Tensor) -> Tensor:
        return x + float((labels > 2).sum()) * model(x, T)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", [name for name in vars(Reading) if not name.startswith("_")])
def test_values_that_decide_are_heard(name: str) -> None:
    function = getattr(Reading(), name)
    ours = fastcfg.accelerate(function)
    for labels in (Y, Y, Y + 3, torch.tensor([3.5, 0.2]), Y):
        column = labels.view(2, 1)
        beside(function, ours, lambda f, y=column: f(NET, X, y))


def test_objects_that_a_function_refers_to_are_heard() -> None:
    class State:
        scale = 1.0

        def __init__(self) -> None:
            self.shift, self.calls = torch.ones(1), 0

    def changing(function: Callable[..., Any], change: Callable[[], Any]) -> None:
        ours = fastcfg.accelerate(function)
        for _ in range(5):
            beside(function, ours, lambda f: f(NET, X, Y))
            change()

    state = State()

    def reads(model: Any, x: Tensor, labels: Tensor) -> Tensor:
        return x * state.shift + state.scale * model(x, T, labels)  # type: ignore[no-any-return]

    changing(reads, lambda: state.shift.mul_(1.5))
    changing(reads, lambda: setattr(State, "scale", State.scale + 1))
    changing(reads, lambda: setattr(state, "scale", state.scale + 1))

    class Inner:
        def __init__(self) -> None:
            self.factors, self.part = [1.0], State()
            self.part.factor = lambda: kept[0]  # type: ignore[attr-defined]

    kept, inner = [1.0], Inner()

    def deep(model: Any, x: Tensor, labels: Tensor) -> Tensor:
        return x + inner.part.factor() * inner.factors[0] * model(x, T, labels)  # type: ignore

    changing(deep, lambda: kept.__setitem__(0, kept[0] + 1))
    changing(deep, lambda: inner.factors.__setitem__(0, inner.factors[0] + 1))

    class Network(siblings.Network):
        level = 2.0

    net = Network()

    def asks(model: Any, x: Tensor, labels: Tensor) -> Tensor:
        return x + model.level * model(x, T, labels)  # type: ignore[no-any-return]

    ours = fastcfg.accelerate(asks)
    for _ in range(4):
        beside(asks, ours, lambda f: f(net, X, Y))
        net.level += 1


def test_generators_of_other_classes_are_told_apart() -> None:
    class Half:
        def randn_like(self, x: Tensor) -> Tensor:
            return 0.5 * torch.randn_like(x)

    ours = fastcfg.accelerate(siblings.sample_karras_heun)
    for generator in (DUMMY, Half(), DUMMY):
        call = lambda f, g=generator: f(consistency, 80 * X, KARRAS, g, s_churn=2.0)  # noqa: E731
        beside(siblings.sample_karras_heun, ours, call)


def test_a_function_that_may_do_more_is_not_dropped() -> None:
    seen: list[Any] = []

    def log(x0: Tensor, t: Tensor) -> Tensor:
        seen.append(float(x0.mean()))
        return x0

    original = solver(correcting_x0_fn=log)
    original.sample(X)
    want = list(seen)
    seen.clear()
    beside(original, fastcfg.accelerate(original), lambda o: o.sample(X), ("the original",))
    assert seen == want * 4


def test_masks_and_other_callbacks_run_as_the_original() -> None:
    original, called = sampler(), list[int]()
    ours = fastcfg.accelerate(original)
    mask = {"mask": torch.ones(1, 1, 8, 8), "x0": X}
    beside(original, ours, lambda o: o.sample(5, 2, SIZE, COND, **mask), ("the original",))
    beside(original, ours, lambda o: o.sample(5, 2, SIZE, COND, callback=called.append), ("the original",))
    assert called == [0, 1, 2, 3, 4] * 4


def test_a_second_network_runs_as_the_original_and_fuses_in_the_model() -> None:
    ours, other = fastcfg.accelerate(siblings.edm2_sampler), siblings.Network()
    call = lambda f: f(NET, X, Y, other, guidance=2.0)  # noqa: E731
    beside(siblings.edm2_sampler, ours, call, ("the original",))
    guided = lambda x, t, y: other(x, t, y).lerp(NET(x, t, y), 2.0)  # noqa: E731
    compare(call(siblings.edm2_sampler), ours(guided, X, Y))


def test_a_tuple_where_a_tensor_was_expected_is_the_originals() -> None:
    def pair(x: Tensor, t: Tensor) -> tuple[Tensor, int]:
        return NET(x, t), 1

    with pytest.raises(AttributeError):
        siblings.edm2_sampler(lambda x, t, y: pair(x, t), X)
    with pytest.raises(AttributeError):
        fastcfg.accelerate(siblings.edm2_sampler)(lambda x, t, y: pair(x, t), X)


class Engine(nn.Module):
    denoiser = sampler = first_stage_model = None


REFUSED = {
    "accelerate\\(sampler.sample_ode": TRANSPORT,
    "sample_heun": siblings.KarrasDenoiser(),
    "fastcfg.Sampler with": siblings.SuperResolution(),
    "accelerate\\(edm_sampler": NET,
    "engine.sampler = ": Engine(),
    "expected a diffusion of": object(),
}


@pytest.mark.parametrize("instead", REFUSED)
def test_what_is_refused_names_what_to_do(instead: str) -> None:
    with pytest.raises(TypeError, match=instead):
        fastcfg.accelerate(REFUSED[instead])


# The originals of the recipes of the page, by heading.
RECIPES = {
    "Guided by another network": lambda v: siblings.edm2_sampler(
        v["net"], v["latents"], v["class_labels"], v["gnet"], guidance=2.0
    ),
    "The last of a list": lambda v: v["transport"].sample_sde("Heun")(v["latents"], v["net"], y=v["class_labels"])[-1],
    "Consistency models": lambda v: siblings.sample_karras_heun(
        v["denoise"], 80 * v["latents"], v["sigmas"], v["generator"]
    ),
    "SR3": lambda v: v["super_resolution"].super_resolution(v["low"]),
    "A latent diffusion's own sampler": lambda v: siblings.PLMSSampler(v["latent_diffusion"]).sample(
        5, 2, SIZE, v["cond"]
    )[0],
    "Guidance by the engine": lambda v: siblings.edm2_sampler(
        lambda x, t, y: NET(x, t, 0 * y).lerp(NET(x, t, y), 2.0), v["latents"], v["class_labels"]
    ),
}


def test_recipes_of_the_page() -> None:
    page = (ROOT / "docs/descendants.md").read_text(encoding="utf-8").partition("## Recipes")[2]
    found = re.findall(r"^### (.*?)\n.*?^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert dict(found).keys() == RECIPES.keys()
    given: dict[str, Any] = {
        "torch": torch,
        "fastcfg": fastcfg,
        **vars(siblings),
        "net": NET,
        "gnet": siblings.Network(),
        "latents": X,
        "class_labels": Y,
        "low": -X,
        "cond": COND,
        "transport": TRANSPORT,
        "karras": siblings.KarrasDenoiser(),
        "sigmas": KARRAS,
        "generator": DUMMY,
        "super_resolution": siblings.SuperResolution(),
        "latent_diffusion": siblings.LatentDiffusion(),
        "sample_heun": siblings.sample_karras_heun,
    }
    for heading, code in found:
        ours = ran(code, lambda block: (exec(block, given), given["images"])[1])
        want = ran(None, lambda _, h=heading: RECIPES[h](given))
        compare(want[0], ours[0])
        assert ours[1] == want[1] or heading == "SR3"
        assert ours[2] == want[2]
