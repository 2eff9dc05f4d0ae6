#!/usr/bin/env bash
# torch 2.13.0: the operator schema of batch normalization does not say that training writes the running statistics.
#
# Seen: aten::batch_norm and aten::native_batch_norm, called with training=True, write running_mean and running_var in
# place. Their schemas mark neither argument as written (no alias annotation, is_mutable is False), and the tensors'
# version counters stay where they were, which any other write in place moves. So neither a look at the schemas nor
# one at the counters finds these writes. aten::_native_batch_norm_legit takes the same arguments, writes the same
# values and does say so: Tensor(a!) running_mean, Tensor(b!) running_var.
#
# What to do: where mutations are looked for by schema, name these operators besides, or compare values.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.2.6
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import torch

aten = torch.ops.aten
torch.manual_seed(0)
x = torch.randn(4, 3, 5)


def written(schema):
    return [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]


def statistics(operator, *more):
    mean, variance = torch.zeros(3), torch.ones(3)
    operator(x, None, None, mean, variance, True, 0.1, 1e-5, *more)
    return mean, variance


expected_mean, expected_variance = 0.1 * x.mean((0, 2)), 0.9 + 0.1 * x.var((0, 2))
for operator, more in ((aten.batch_norm.default, (False,)), (aten.native_batch_norm.default, ())):
    mean, variance = statistics(operator, *more)
    torch.testing.assert_close(mean, expected_mean)
    torch.testing.assert_close(variance, expected_variance)
    schema = operator._schema
    versions = mean._version, variance._version
    print(f"{operator}: writes both; schema: written {written(schema)}, is_mutable {schema.is_mutable}; {versions=}")
    assert written(schema) == [] and not schema.is_mutable, schema
    assert versions == (0, 0), versions

legit = aten._native_batch_norm_legit.default
mean, variance = statistics(legit)
torch.testing.assert_close(mean, expected_mean)
torch.testing.assert_close(variance, expected_variance)
print(f"{legit}: writes both; schema: written {written(legit._schema)}, is_mutable {legit._schema.is_mutable}")
assert written(legit._schema) == ["running_mean", "running_var"] and legit._schema.is_mutable, legit._schema

other = torch.zeros(3)
other.add_(1)
assert other._version == 1, other._version
print(f"as described, torch {torch.__version__}")
PY
