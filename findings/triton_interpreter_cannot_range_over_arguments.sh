#!/usr/bin/env bash
# triton 3.6.0 with numpy 2.4.6: in the interpreter, a kernel's `for i in range(n)` over an argument fails.
#
# Seen: with TRITON_INTERPRET=1 an integer argument is a tensor that holds an array of shape (1,), and range(n) asks it
# for an index by int(array). numpy 2.4.6 makes that a TypeError ("only 0-dimensional arrays can be converted to Python
# scalars"), which arrives as an InterpreterError; in 2.2.6 it is a DeprecationWarning. The same kernel runs with numpy
# 2.2 and with triton 3.9.0. `while i < n` works everywhere: a comparison is asked for its truth alone.
#
# Who meets it: tests of kernels on machines without a GPU. What to do: loop with while, or use an older numpy.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps triton==3.6.0
cd "$folder"
cat > loops.py <<'PY'
import sys

import numpy
import torch
import triton
import triton.language as tl


@triton.jit
def with_range(out_ptr, n):
    total = 0
    for i in range(n):
        total += i
    tl.store(out_ptr, total)


@triton.jit
def with_while(out_ptr, n):
    total = 0
    i = 0
    while i < n:
        total += i
        i += 1
    tl.store(out_ptr, total)


def run(kernel):
    out = torch.zeros(1, dtype=torch.int32)
    try:
        kernel[(1,)](out, 5)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return int(out)


found = {"range": run(with_range), "while": run(with_while)}
print(f"triton {triton.__version__}, numpy {numpy.__version__}: {found}")
fails = "0-dimensional" in str(found["range"])
assert found["while"] == 10 and (fails if sys.argv[1] == "fails" else found["range"] == 10), found
PY
export TRITON_INTERPRET=1
"$folder/venv/bin/python" loops.py fails
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps numpy==2.2.6
"$folder/venv/bin/python" -W ignore loops.py works
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps numpy==2.4.6 triton==3.9.0
"$folder/venv/bin/python" loops.py works
echo "as described"
