"""torch's private names: each does what fastcfg uses it for, and none is used elsewhere."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from support import ROOT
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from fastcfg.ops import inductor_problem
from fastcfg.utils import _torch_private as private

PRIVATE = re.compile(
    r"\btorch(\.\w+)*\._[A-Za-z]|\bfrom torch(\.\w+)*(\._\w+)+ import|\bfrom torch\S* import .*\b_[a-z]"
)
# Documented, in spite of their names.
DOCUMENTED = ("torch._foreach_",)


class Watching(private.TorchDispatchMode):
    """Keeps the names of the operations it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(function._schema.name)
        return function(*args, **(kwargs or {}))


def test_no_other_module_uses_private_names() -> None:
    found = []
    for path in (ROOT / "fastcfg").rglob("*.py"):
        for line in path.read_text(encoding="utf-8").splitlines():
            if path.name != "_torch_private.py" and PRIVATE.search(line) and not any(n in line for n in DOCUMENTED):
                found.append(f"{path.relative_to(ROOT)}: {line.strip()}")
    assert found == []


def test_modes_see_operations_and_can_be_suspended() -> None:
    assert private.current_dispatch_mode() is None
    with Watching() as mode:
        assert private.current_dispatch_mode() is mode
        with private.without_dispatch_modes():
            assert private.current_dispatch_mode() is None
            torch.ones(1)
        torch.zeros(1)
    assert mode.seen == ["aten::zeros"]


def test_transforms_of_functions_are_seen() -> None:
    seen = []

    def cube(x: Tensor) -> Tensor:
        seen.append(private.in_function_transform())
        return x**3

    torch.func.grad(cube)(torch.tensor(2.0))
    torch.func.vmap(cube)(torch.ones(2))
    cube(torch.ones(2))
    with torch.autograd.forward_ad.dual_level():
        cube(torch.ones(2))
    assert seen == [True, True, False, True]


def test_trees_of_containers() -> None:
    tree = {"a": [1, (2, None)], "b": 3}
    assert private.tree_leaves(tree) == [1, 2, None, 3]
    assert private.tree_map(str, tree) == {"a": ["1", ("2", "None")], "b": "3"}


def test_the_switch_that_has_copies_of_numbers_dispatched() -> None:
    """What it does needs a GPU, or a pretend one (`tests/engine/graphs/test_pretend_capture.py`)."""
    assert private.lift_only_cpu_tensors(True) is False
    assert private.lift_only_cpu_tensors(False) is True
    assert private.lift_only_cpu_tensors(False) is False


def test_what_torch_compile_made() -> None:
    module, wrapped = torch.nn.Linear(1, 1), torch.compile(torch.nn.Linear(1, 1))
    assert not private.made_by_compile(module)
    module.compile()
    assert private.made_by_compile(module)
    assert private.made_by_compile(wrapped)
    assert private.made_by_compile(torch.compile(lambda x: x))
    assert not private.made_by_compile(lambda x: x)


def test_the_allocator_s_functions_are_there() -> None:
    assert callable(torch.cuda.memory._cuda_endAllocateToPool)
    assert callable(torch.cuda.memory._cuda_releasePool)


def test_fake_tensors_have_no_data() -> None:
    with private.fake_tensors():
        fake = torch.empty(2, 3)
        assert (fake + 1).shape == (2, 3)
    with pytest.raises(RuntimeError):
        fake.numpy()


def test_inductor_compiles_a_graph_with_one_rounding_of_a_multiply_add() -> None:
    if problem := inductor_problem(torch.device("cpu")):
        assert private.cpp_compiler_problem() in ("", problem)
        pytest.skip(problem)
    assert private.cpp_compiler_problem() == ""

    def step(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return private.inductor_fma()(a, b, c)

    a = 1 + torch.arange(1, 65, dtype=torch.float32) * 2.0**-13
    product = a * a
    compiled = private.inductor_compile(make_fx(step)(a, a, -product), [a, a, -product], {})
    assert torch.equal(compiled(a, a, -product), (a.double() * a.double() - product.double()).float())
