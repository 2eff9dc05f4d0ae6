#!/usr/bin/env bash
# torch 2.13.0: a contiguous tensor cannot always be viewed as bytes, and .contiguous() does not help.
#
# Seen: torch.tensor(0.0).expand(1) has size 1 and stride 0. is_contiguous() is True, since the stride of a dimension
# of size 1 does not count, and contiguous() returns the tensor itself, stride 0 included. But a view as a dtype of
# another element size wants stride 1 in the last dimension, whatever its size: .view(torch.uint8) raises
# RuntimeError: self.stride(-1) must be 1 to view Float as Byte (different element sizes), but got 0. The same holds
# for other strides of a last dimension of size 1, as those of torch.zeros(1, 5).t() and of torch.zeros(3)[::2][:1].
#
# What to do: before the view, clone(memory_format=torch.contiguous_format); contiguous() is enough only where the
# last dimension has more than one element.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.2.6
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import torch

cases = {
    "torch.tensor(0.0).expand(1)": (torch.tensor(0.0).expand(1), 0),
    "torch.zeros(1, 5).t()": (torch.zeros(1, 5).t(), 5),
    "torch.zeros(3)[::2][:1]": (torch.zeros(3)[::2][:1], 2),
}
for name, (tensor, stride) in cases.items():
    assert tensor.is_contiguous() and tensor.contiguous() is tensor, name
    assert tensor.stride(-1) == stride, tensor.stride()
    assert tensor.view(torch.int32).shape == tensor.shape, name
    try:
        tensor.contiguous().view(torch.uint8)
    except RuntimeError as error:
        print(f"{name}, contiguous, stride {tensor.stride()}: RuntimeError: {error}")
        assert "self.stride(-1) must be 1" in str(error) and f"got {stride}" in str(error), error
    else:
        raise SystemExit(f"changed: {name} is viewed as bytes")
    fresh = tensor.clone(memory_format=torch.contiguous_format)
    assert fresh.stride(-1) == 1 and fresh.view(torch.uint8).shape == (*tensor.shape[:-1], 4), fresh.stride()

plain = torch.zeros(1)
assert plain.stride() == (1,) and plain.view(torch.uint8).shape == (4,)
print(f"as described, torch {torch.__version__}")
PY
