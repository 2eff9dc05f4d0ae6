#!/usr/bin/env bash
# diffusers 0.42.1: randn_tensor with fewer generators than samples raises only after it moved the generators given.
#
# Seen: randn_tensor((3, 4), generator=[a, b]) raises IndexError: list index out of range; a and b have been drawn from
# by then. Whoever catches the error, completes the list and calls again gets other noise for the first two samples
# than the same seeds would have given. The lengths are not compared first: more generators than samples are accepted,
# the rest is left unused, and a list of one generator draws the whole batch.
#
# What to do: compare len(generators) with the batch before the call, or seed the generators again after an error.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.2.6 diffusers==0.42.1
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import diffusers
import torch
from diffusers.utils.torch_utils import randn_tensor


def seeded(count):
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def moved(generators):
    return [not torch.equal(g.get_state(), s.get_state()) for g, s in zip(generators, seeded(len(generators)))]


shape = (3, 4)
expected = randn_tensor(shape, generator=seeded(3))
generators = seeded(2)
assert moved(generators) == [False, False]
try:
    randn_tensor(shape, generator=generators)
except IndexError as error:
    print(f"2 generators for 3 samples: IndexError: {error}; moved: {moved(generators)}")
    assert moved(generators) == [True, True], moved(generators)
else:
    raise SystemExit("changed: two generators are accepted for three samples")

again = randn_tensor(shape, generator=[*generators, torch.Generator().manual_seed(2)])
same = [torch.equal(a, b) for a, b in zip(again, expected)]
print(f"called again with a third: samples as the seeds give them: {same}")
assert same == [False, False, True], same

generators = seeded(4)
assert torch.equal(randn_tensor(shape, generator=generators), expected)
print(f"4 generators for 3 samples: accepted; moved: {moved(generators)}")
assert moved(generators) == [True, True, True, False], moved(generators)
generators = seeded(1)
assert torch.equal(randn_tensor(shape, generator=generators), randn_tensor(shape, generator=seeded(1)[0]))
print(f"as described, diffusers {diffusers.__version__}")
PY
