"""Prompts, models and conditionings that change with the row, or in the caller's hands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.pairwise import pairwise
from torch import Tensor, nn

from fastcfg import APG, CFG, AdaptiveCFG, ByRow, Guidance, Padded, Sampler, Schedule, Step, StepTable, inpaint, solvers
from fastcfg.engine.conditioning import Shared

pytestmark = pytest.mark.quick

B, SHAPE = 2, (2, 3, 4, 4)
SCHEDULE = Schedule.named("squaredcos_cap_v2", 100).respace(5)
SIGMAS = [14.6, 6.0, 3.0, 1.2, 0.4, 0.0]
TABLES = {
    "ddpm learned": solvers.ddpm(SCHEDULE),
    "ddim": solvers.ddim(SCHEDULE, eta=0.5),
    "heun": solvers.heun(SIGMAS[:4]),
    "dpmpp_2m": solvers.dpmpp_2m(SIGMAS),
    "cfg++": solvers.ddim_cfg_pp(SCHEDULE),
}
GUIDANCES: dict[str, Guidance | None] = {
    "none": None,
    "cfg": CFG(lambda progress: 4 - 2 * progress),
    "interval": CFG(3.0, interval=(0.3, 0.8)),
    "apg": APG(3.0, momentum=-0.5, rescale=0.5),
    "map": CFG(torch.linspace(1, 3, 4).view(1, 1, 1, 4)),
    "adaptive": AdaptiveCFG(3.0, threshold=0.9),
}
WAYS: dict[str, dict[str, Any]] = {
    "eager": {"graph": False},
    "captured": {"graph": True},
    "rows of graphs": {"graph": True, "rows_per_graph": 2},
    "captured serial": {"graph": True, "batching": "serial"},
    "captured kernel": {"graph": True, "backend": "triton"},
}


def words(length: int, seed: int) -> Tensor:
    return torch.randn(B, length, 3, generator=torch.Generator().manual_seed(seed))


CAT, DOG, LONG, EMPTY = words(4, 0), words(4, 1), words(7, 2), words(4, 3)


class Model(nn.Module):
    def __init__(self, variance: bool = False, gain: float = 0.7) -> None:
        super().__init__()
        self.variance, self.gain = variance, nn.Parameter(torch.tensor(gain))

    def forward(self, x: Tensor, t: Tensor, text: Tensor, strength: Any = 1.0) -> Tensor:
        x = x / (1 + x.square()).sqrt()
        m = torch.tanh(self.gain * x + text.mean(1)[:, :, None, None] * strength) - 0.002 * t.view(-1, 1, 1, 1)
        return torch.cat([m, torch.sin(3 * x)], dim=1) if self.variance else m


def make(table: str = "ddim", guidance: Guidance | None = None, model: Any = None, **options: Any) -> Sampler:
    model = Model(TABLES[table].learned_variance) if model is None else model
    return Sampler(model, TABLES[table], guidance=guidance, **{"clip": 1.0, "graph": False, **options})


def given(run: Sampler, cond: Any, **uncond: Any) -> dict[str, Any]:
    branches = {"cond": cond, "uncond": uncond or {"text": EMPTY}}
    return {name: branches[name] for name in run.guidance.branches}


def draw(run: Sampler, cond: Any, **options: Any) -> Tensor:
    return run.sample(SHAPE, branches=given(run, cond), seed=3, **options)


def by_hand(run: Sampler, cond: list[Tensor], models: list[Any] | None = None) -> Tensor:
    """A run whose prompt, or model, is chosen by the model itself, row by row, which counts its calls."""
    calls: list[int] = []

    def model(x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        row = len(calls)
        calls.append(row)
        parts = x.chunk(len(x) // B)
        # The empty prompt stands for the unconditional branch, and zeros for the conditional one.
        texts = [cond[row] if not bool(part.any()) else part for part in text.chunk(len(parts))]
        chosen = run.model if models is None else models[row]
        if len({part.shape for part in texts}) > 1:
            pairs = zip(parts, texts, strict=True)
            return torch.cat([chosen(part, t[:B], text) for part, text in pairs])
        return chosen(x, t, torch.cat(texts))

    plain = Sampler(model, run.table, guidance=run.guidance, clip=1.0, graph=False, backend=run.backend)
    return draw(plain, {"text": torch.zeros_like(EMPTY)})


FACTORS = {
    "table": ("ddpm learned", "heun", "dpmpp_2m", "cfg++"),
    "guidance": ("cfg", "interval", "apg", "map", "adaptive", "none"),
    "way": tuple(WAYS),
    "when": ("progress", "row", "index"),
    "what": ("prompt", "argument", "model", "prompt and model"),
}


def forbidden(case: dict[str, Any]) -> bool:
    """The unconditional output needs its branch; what the interpreter's exponentials give is tests/kernels' matter."""
    without = case.get("guidance") in ("none", "adaptive") and case.get("table") == "cfg++"
    return without or (case.get("table") == "ddpm learned" and case.get("way") == "captured kernel")


def turns(case: dict[str, Any], table: StepTable, first: Any, second: Any) -> ByRow:
    if case["when"] == "progress":
        return ByRow(first, second, progress=0.4)
    if case["when"] == "row":
        return ByRow(first, second, row=3)
    return ByRow(first, second, index=[row % 2 for row in range(table.num_rows)])


@pytest.mark.parametrize("case", pairwise(FACTORS, forbidden), ids=lambda case: " ".join(case.values()))
def test_what_changes_with_the_row_is_what_the_model_would_choose(case: dict[str, Any]) -> None:
    table, guidance = TABLES[case["table"]], GUIDANCES[case["guidance"]]
    models = [Model(table.learned_variance, gain) for gain in (0.7, 0.4)]
    run = make(case["table"], guidance, models[0], **WAYS[case["way"]])
    cond: Any = {"text": CAT}
    text = [CAT] * table.num_rows
    chosen: list[Any] = [models[0]] * table.num_rows
    indices = turns(case, table, 0, 1).indices(table)
    if "prompt" in case["what"]:
        cond = turns(case, table, {"text": CAT}, {"text": DOG})
        text = [(CAT, DOG)[index] for index in indices]
    if case["what"] == "argument":
        cond = {"text": turns(case, table, CAT, DOG)}
        text = [(CAT, DOG)[index] for index in indices]
    if "model" in case["what"]:
        run.model = turns(case, table, *models)
        chosen = [models[index] for index in indices]
    want = by_hand(run, text, chosen)
    for _ in range(2):
        got = draw(run, cond)
        # One branch after the other may round differently.
        assert torch.allclose(got, want, rtol=0, atol=1e-5) if "serial" in case["way"] else torch.equal(got, want)
    report = run.report()
    assert report["captures"] == 1
    kinds = {program["model"] for program in report["programs"]}
    assert kinds == (set(indices) if "model" in case["what"] else {0})
    if case["way"] != "eager":
        assert {program["graph"] for program in report["programs"]} == {"stand-in"}
    if case["what"] == "model":
        assert report["conditioning_copies"] == []
    elif case["guidance"] == "cfg" and case["what"] == "prompt":
        changes = [row for row in range(1, len(indices)) if indices[row] != indices[row - 1]]
        assert report["conditioning_copies"] == changes
    # The same prompt costs no pass over the state.
    plain = make(case["table"], guidance, models[0], **WAYS[case["way"]])
    draw(plain, {"text": CAT})
    passes = [{program["passes"] for program in of.report()["programs"]} for of in (run, plain)]
    assert passes[0] == passes[1]


@pytest.mark.parametrize("way", WAYS)
def test_a_prompt_by_row_that_stays_is_plain(way: str) -> None:
    run, plain = (make(guidance=CFG(3.0), **WAYS[way]) for _ in range(2))
    want = draw(plain, {"text": CAT})
    for cond in (ByRow({"text": CAT}, {"text": CAT}, progress=0.5), {"text": ByRow(CAT, CAT.clone(), row=2)}):
        assert torch.equal(draw(run, cond), want)
    assert torch.equal(draw(run, ByRow({"text": CAT}, index=[0] * 5)), want)
    assert run.report()["programs"] == plain.report()["programs"]
    assert run.report()["captures"] == 1
    assert run.report()["conditioning_copies"] == []


@pytest.mark.parametrize("graph", [False, True])
def test_prompts_of_other_lengths_are_programs_of_their_own(graph: bool) -> None:
    run = make(guidance=CFG(3.0), graph=graph)
    cond = ByRow({"text": CAT}, {"text": LONG}, {"text": DOG}, row=(1, 3))
    got = draw(run, cond)
    assert torch.allclose(got, by_hand(run, [CAT, LONG, LONG, DOG, DOG]), rtol=0, atol=1e-5)
    report = run.report()
    assert [program["batching"] for program in report["programs"]] == ["batched", "serial"]
    assert report["conditioning_copies"] == [3]


def test_a_negative_prompt_and_values_by_row() -> None:
    run, by_progress = make(guidance=CFG(3.0), graph=True), {"progress": 0.5}
    cond = {"text": CAT, "strength": ByRow(Shared(1.0), Shared(0.5), **by_progress)}
    uncond = {"text": ByRow(EMPTY, DOG, **by_progress), "strength": Shared(1.0)}
    got = run.sample(SHAPE, cond=cond, uncond=uncond, seed=3)
    rows = TABLES["ddim"].num_rows
    second = int(0.5 * rows)

    class Chooses:
        def __init__(self) -> None:
            self.row = -1

        def __call__(self, x: Tensor, t: Tensor) -> Tensor:
            self.row += 1
            late, model = self.row >= second, run.model
            first, other = x.chunk(2)
            one = model(first, t[:B], CAT, 0.5 if late else 1.0)
            return torch.cat([one, model(other, t[:B], DOG if late else EMPTY, 1.0)])

    plain = Sampler(Chooses(), run.table, guidance=CFG(3.0), clip=1.0, graph=False)
    want = plain.sample(SHAPE, cond={}, uncond={}, seed=3)
    assert torch.allclose(got, want, rtol=0, atol=1e-6)


# Experts, a refiner, a network that is switched off


@pytest.mark.parametrize("graph", [False, True])
def test_history_goes_from_model_to_model_or_begins_again(graph: bool) -> None:
    high, low = Model(gain=0.7), Model(gain=0.3)
    experts = ByRow(high, low, time=2.0)
    assert experts.indices(TABLES["dpmpp_2m"]) == (0, 0, 0, 1, 1)
    carried = make("dpmpp_2m", CFG(3.0), experts, graph=graph)
    got = draw(carried, {"text": CAT})
    assert torch.equal(got, by_hand(carried, [CAT] * 5, [high] * 3 + [low] * 2))
    # Two runs, the second from where the first ended, each with a table of its own.
    tables = solvers.dpmpp_2m(SIGMAS[:4]), solvers.dpmpp_2m(SIGMAS[3:])
    x = None
    for model, table in zip((high, low), tables, strict=True):
        part = Sampler(model, table, guidance=CFG(3.0), clip=1.0, graph=False)
        x = part.sample(SHAPE, branches=given(part, {"text": CAT}), seed=3, x_T=x)
    again = make("dpmpp_2m", CFG(3.0), experts, graph=graph)
    again.table = again.table.restarted(3)
    assert torch.equal(draw(again, {"text": CAT}), x)
    assert not torch.equal(x, got)  # type: ignore[arg-type]


def test_models_may_take_other_conditionings() -> None:
    class Refiner(Model):
        def forward(self, x: Tensor, t: Tensor, text: Tensor, aesthetic: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x, t, text, aesthetic[:, None, None, None])

    base, refiner = Model(), Refiner()
    score = {name: torch.full((B,), value) for name, value in (("cond", 2.0), ("uncond", 0.5))}
    prompts = {"cond": CAT, "uncond": EMPTY}
    branches = {
        name: ByRow({"text": prompts[name]}, {"text": prompts[name], "aesthetic": score[name]}, row=3)
        for name in prompts
    }
    run = make(guidance=CFG(3.0), model=ByRow(base, refiner, row=3), graph=True)
    got = run.sample(SHAPE, branches=branches, seed=3)

    class Both:
        row = -1

        def __call__(self, x: Tensor, t: Tensor) -> Tensor:
            Both.row += 1
            text, scores = torch.cat([*prompts.values()]), torch.cat([*score.values()])
            return base(x, t, text) if Both.row < 3 else refiner(x, t, text, scores)

    want = Sampler(Both(), run.table, guidance=CFG(3.0), clip=1.0, graph=False)
    assert torch.equal(got, want.sample(SHAPE, cond={}, uncond={}, seed=3))
    assert [program["graph"] for program in run.report()["programs"]] == ["stand-in"] * 2


class Encoding(Model):
    """Computes a part of its conditioning once."""

    def precompute(self, prompt: Tensor) -> dict[str, Tensor]:
        return {"text": prompt[:, None].expand(B, 4, 3) * (1 + self.gain.detach())}


@pytest.mark.parametrize("graph", [False, True])
def test_every_models_conditioning_is_computed_by_itself(graph: bool) -> None:
    models = Encoding(gain=0.7), Encoding(gain=0.2)
    run = make(guidance=CFG(3.0), model=ByRow(*models, row=2), graph=graph)
    prompts = {"cond": CAT[:, 0], "uncond": EMPTY[:, 0]}
    got = run.sample(SHAPE, branches={name: {"prompt": prompt} for name, prompt in prompts.items()}, seed=3)

    class Both:
        row = -1

        def __call__(self, x: Tensor, t: Tensor) -> Tensor:
            Both.row += 1
            model = models[Both.row >= 2]
            return model(x, t, torch.cat([model.precompute(prompt)["text"] for prompt in prompts.values()]))

    want = Sampler(Both(), run.table, guidance=CFG(3.0), clip=1.0, graph=False)
    assert torch.equal(got, want.sample(SHAPE, cond={}, uncond={}, seed=3))
    assert run.report()["conditioning_copies"] == [2]


def test_weights_of_every_model_are_followed() -> None:
    models = Model(gain=0.7), Model(gain=0.3)
    run = make(guidance=CFG(3.0), model=ByRow(*models, row=2), graph=True)
    first = draw(run, {"text": CAT})
    models[1].gain = nn.Parameter(torch.tensor(0.9))
    got = draw(run, {"text": CAT})
    assert "models[1].gain" in run.report()["recaptured"]
    assert torch.equal(got, by_hand(run, [CAT] * 5, [models[0]] * 2 + [models[1]] * 3))
    assert not torch.equal(got, first)


# What a caller changes between rows


def swap_in_place(cond: dict[str, Any], texts: list[Tensor]) -> None:
    cond["text"].copy_(DOG)


def swap_item(cond: dict[str, Any], texts: list[Tensor]) -> None:
    cond["text"] = DOG.clone()


def swap_noncontiguous(cond: dict[str, Any], texts: list[Tensor]) -> None:
    cond["text"] = DOG.mT.contiguous().mT


@pytest.mark.parametrize("way", ["eager", "captured", "captured kernel", "rows of graphs"])
@pytest.mark.parametrize("form", ["callback", "iterate", "start"])
@pytest.mark.parametrize("change", [swap_in_place, swap_item, swap_noncontiguous], ids=lambda change: change.__name__)
def test_a_change_between_rows_counts_from_the_next_row_on(
    change: Callable[[dict[str, Any], list[Tensor]], None], form: str, way: str
) -> None:
    run, cond = make(guidance=CFG(3.0), **WAYS[way]), {"text": CAT.clone()}
    draw(run, cond, callback=lambda step: None)
    assert run.report()["conditioning_copies"] == []

    def callback(step: Step) -> None:
        if step.row == 1:
            change(cond, [])

    if form == "callback":
        got = draw(run, cond, callback=callback)
    elif form == "iterate":
        for step in run.iterate(SHAPE, branches=given(run, cond), seed=3):
            callback(step)
        got = step.x
    else:
        started = run.start(SHAPE, branches=given(run, cond), seed=3)
        for row in started.rows():
            callback(started.step(row))
        got = started.result
    assert torch.equal(got, by_hand(run, [CAT, CAT, DOG, DOG, DOG]))
    assert run.report()["conditioning_copies"] == [2]
    assert run.report()["captures"] == 1


def turns_of(*index: int) -> ByRow:
    return ByRow(CAT.clone(), DOG.clone(), index=index)


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("replacement", [turns_of(0, 0, 0, 1, 0), DOG], ids=["other turns", "one prompt"])
def test_turns_may_be_replaced(replacement: Any, graph: bool) -> None:
    run, cond = make(guidance=CFG(3.0), graph=graph), {"text": turns_of(0, 1, 1, 1, 1)}

    def callback(step: Step) -> None:
        if step.row == 1:
            cond["text"] = replacement

    got = draw(run, cond, callback=callback)
    later = [CAT, DOG, CAT] if isinstance(replacement, ByRow) else [DOG] * 3
    assert torch.equal(got, by_hand(run, [CAT, DOG, *later]))


def test_turns_of_other_lengths_must_keep_their_rows() -> None:
    other, cond = torch.cat([DOG, DOG], dim=1), {}
    cond["text"] = ByRow(CAT, other, index=[0, 0, 0, 1, 1])

    def callback(step: Step) -> None:
        if step.row == 1:
            cond["text"] = ByRow(CAT, other, index=[0, 0, 1, 1, 0])

    with pytest.raises(ValueError, match="cond: got other shapes, dtypes or values before row 2"):
        draw(make(guidance=CFG(3.0)), cond, callback=callback)


@pytest.mark.parametrize("graph", [False, True])
def test_a_change_counts_in_inference_mode_too(graph: bool) -> None:
    run = make(guidance=CFG(3.0), graph=graph)
    with torch.inference_mode():
        cond = {"text": CAT.clone()}
        got = draw(run, cond, callback=lambda step: cond["text"].copy_(DOG) if step.row == 1 else None)
    assert torch.equal(got, by_hand(run, [CAT, CAT, DOG, DOG, DOG]))


@pytest.mark.parametrize("graph", [False, True])
def test_a_branchs_whole_conditioning_may_be_replaced(graph: bool) -> None:
    run = make(guidance=CFG(3.0), graph=graph)
    branches = {"cond": {"text": CAT}, "uncond": {"text": EMPTY}}

    def callback(step: Step) -> None:
        if step.row == 1:
            branches["cond"] = {"text": DOG}

    got = run.sample(SHAPE, branches=branches, seed=3, callback=callback)
    assert torch.equal(got, by_hand(run, [CAT, CAT, DOG, DOG, DOG]))


def test_a_change_of_a_later_prompt_counts_when_its_turn_comes() -> None:
    later = DOG.clone()
    run = make(guidance=CFG(3.0), graph=True)
    got = draw(
        run,
        ByRow({"text": CAT}, {"text": later}, row=3),
        callback=lambda step: later.copy_(EMPTY) if step.row == 0 else None,
    )
    assert torch.equal(got, by_hand(run, [CAT] * 3 + [EMPTY * 1.0] * 2))


def test_a_classifier_sees_the_change() -> None:
    seen: list[float] = []

    def cond_fn(x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        seen.append(float(text[0, 0, 0]))
        return torch.zeros_like(x)

    run, cond = make("ddpm learned", cond_fn=cond_fn), {"text": CAT.clone()}
    draw(run, cond, callback=lambda step: cond["text"].zero_() if step.row == 2 else None)
    assert seen == [float(CAT[0, 0, 0])] * 3 + [0.0] * 2
    seen.clear()
    draw(run, ByRow({"text": CAT}, {"text": DOG}, row=2))
    assert seen == [float(CAT[0, 0, 0])] * 2 + [float(DOG[0, 0, 0])] * 3


@pytest.mark.parametrize("value", [LONG, CAT.double(), 3])
def test_a_change_that_needs_a_capture_is_refused(value: Any) -> None:
    run, cond = make(guidance=CFG(3.0)), {"text": CAT}

    def callback(step: Step) -> None:
        cond["text"] = value

    with pytest.raises(ValueError, match=r"text|before row 1, expected other contents of tensors alone"):
        draw(run, cond, callback=callback)
    # The sampler stays usable.
    assert draw(run, {"text": CAT}).isfinite().all()


# What is refused


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((1, 2), {}, "ByRow: got none of progress, time, row, index, expected one of them"),
        ((1, 2), {"progress": 0.5, "row": 3}, "ByRow: got progress, row of"),
        ((), {"row": ()}, "ByRow: got no values"),
        ((1, 2), {"progress": (0.2, 0.4)}, r"progress: got \(0.2, 0.4\), expected 1, ascending"),
        ((1, 2, 3), {"time": (100, 900)}, r"time: got \(100, 900\), expected 2, descending"),
        ((1, 2), {"progress": float("nan")}, "progress: got nan, expected a finite number"),
        ((1, 2), {"progress": 40}, "progress: got 40, expected fractions of the run, 0 to 1"),
    ],
)
def test_turns_that_do_not_fit_are_refused(arguments: tuple[Any, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ByRow(*arguments, **options)


@pytest.mark.parametrize("index", [[0, 1], [0, 1, 2, 0, 0], [0, 0, 0, 0, 0.5], lambda progress: 2])
def test_indices_that_do_not_fit_are_refused_when_a_run_is_planned(index: Any) -> None:
    run = make(guidance=CFG(3.0))
    with pytest.raises(ValueError, match=r"index: got .*, expected one for each of the 5 rows, from 0 to 1"):
        draw(run, ByRow({"text": CAT}, {"text": DOG}, index=index))
    assert run.memory() == 0


def test_numbers_of_any_library_say_when() -> None:
    table = TABLES["ddim"]
    for half in (0.5, torch.tensor(0.5), torch.tensor(0.5).numpy(), [torch.tensor(0.5)]):
        assert ByRow("a", "b", progress=half).indices(table) == (0, 0, 1, 1, 1)
    assert ByRow("a", "b", index=torch.tensor([0, 1, 0, 1, 1])).indices(table) == (0, 1, 0, 1, 1)
    # Two evaluations of a step have one progress.
    assert ByRow("a", "b", progress=0.5).indices(TABLES["heun"]) == (0, 0, 1, 1, 1, 1)


def test_models_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(TypeError, match="model: got int, expected a callable"):
        make(model=ByRow(Model(), 3, row=1))
    with pytest.raises(
        ValueError, match=r"model: got one of torch.bfloat16 beside one of torch.float32, expected one dtype"
    ):
        make(model=ByRow(Model(), Model().bfloat16(), row=1))
    make(model=ByRow(Model(), Model().bfloat16(), row=1), dtype=torch.float32)


def test_a_classifiers_conditioning_keeps_its_layout() -> None:
    run = make("ddpm learned", cond_fn=lambda x, t, text: torch.zeros_like(x))
    with pytest.raises(ValueError, match="cond: got other shapes or values in some rows"):
        draw(run, ByRow({"text": CAT}, {"text": LONG}, row=1))


def test_padded_prompts_take_turns() -> None:
    class Masked(Model):
        def forward(self, x: Tensor, t: Tensor, text: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
            mean = (text * mask[..., None]).sum(1, keepdim=True) / mask.sum(1)[:, None, None]
            return super().forward(x, t, mean)

    run = make(guidance=CFG(3.0), model=Masked(), graph=True)
    cond = {"text": ByRow(Padded(CAT, "mask"), Padded(LONG, "mask"), row=2)}
    got = run.sample(SHAPE, cond=cond, uncond={"text": Padded(EMPTY, "mask")}, seed=3)
    plain = make(guidance=CFG(3.0))
    plain.model.load_state_dict(run.model.state_dict())
    want = by_hand(plain, [CAT] * 2 + [LONG.mean(1, keepdim=True).expand(B, 4, 3)] * 3)
    assert torch.allclose(got, want, rtol=0, atol=1e-5)


# With runs in parts


@pytest.mark.parametrize("way", ["eager", "captured", "rows of graphs"])
@pytest.mark.parametrize("table", ["dpmpp_2m", "ddim"])
@pytest.mark.parametrize("stop", [2, 3])
def test_two_parts_are_one_piece(table: str, way: str, stop: int) -> None:
    """A part that begins before, at or after a turn has the prompt and the model of its rows."""
    models = Model(gain=0.7), Model(gain=0.3)
    cond = ByRow({"text": CAT}, {"text": DOG}, row=3)
    whole, parts = (make(table, CFG(3.0), ByRow(*models, row=2), **WAYS[way]) for _ in range(2))
    want = draw(whole, cond)
    state = parts.export(SHAPE, stop=stop, branches=given(parts, cond), seed=3)
    for _ in range(2):
        assert torch.equal(parts.resume(state, branches=given(parts, cond)), want)
    assert parts.report()["conditioning_copies"] == ([3] if stop == 2 else [])
    assert parts.report()["rows"] == 5 - stop
    # The sampler's memory now holds the second prompt: a new run begins with the first.
    assert torch.equal(draw(parts, cond), want)


def test_a_change_in_a_part_counts_there() -> None:
    run, cond = make("ddim", CFG(3.0), graph=True), {"text": CAT.clone()}
    state = run.export(SHAPE, stop=2, branches=given(run, cond), seed=3)
    got = run.resume(
        state,
        branches=given(run, cond),
        callback=lambda step: cond["text"].copy_(DOG) if step.row == 3 else None,
    )
    assert torch.equal(got, by_hand(run, [CAT] * 4 + [DOG]))
    assert run.report()["conditioning_copies"] == [4]


@pytest.mark.parametrize(
    "options",
    [
        {"log_prob": True},
        {"state_fn": lambda x, x0, row: x + 0.1 * x0},
        {"state_fn": inpaint(torch.eye(4).view(1, 1, 4, 4), torch.zeros(SHAPE))},
        {"check_finite": "raise"},
    ],
    ids=["log_prob", "state_fn", "inpaint", "check_finite"],
)
def test_with_what_else_a_row_may_do(options: dict[str, Any]) -> None:
    """Prompts, models and a map beside it: captured as eager, and a prompt by row that stays is plain."""
    fixed = {name: options[name] for name in options if name == "check_finite"}
    given_to_sample = {name: value for name, value in options.items() if name not in fixed}
    models, results = ByRow(Model(gain=0.7), Model(gain=0.3), row=2), []
    for way in ("eager", "captured", "rows of graphs"):
        run = make("ddim", GUIDANCES["map"], models, **WAYS[way], **fixed)
        for cond in (
            ByRow({"text": CAT}, {"text": DOG}, row=3),
            ByRow({"text": CAT}, {"text": CAT}, row=3),
            {"text": CAT},
        ):
            results.append(draw(run, cond, **given_to_sample))
        plain = make("ddim", CFG(3.0), models)
        draw(plain, {"text": CAT})
        passes = [max(program["passes"] for program in of.report()["programs"]) for of in (run, plain)]
        assert passes[0] == passes[1] + 2, "one for the map, one for the option"
    states = [getattr(result, "samples", result) for result in results]
    for k in (0, 1):
        assert torch.equal(states[k], states[3 + k])
        assert torch.equal(states[k], states[6 + k])
    assert torch.equal(states[1], states[2])
    assert not torch.equal(states[0], states[1])
