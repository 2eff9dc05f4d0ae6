#!/usr/bin/env bash
# torch 2.13.0: torch.save with its default protocol cannot write a torch.memory_format, anywhere in an object.
#
# Seen: torch.save({"memory_format": torch.channels_last}, file) raises TypeError: cannot pickle 'module' object.
# pickle.dumps, copy.deepcopy and torch.save(..., pickle_protocol=4) write it. A memory format reduces itself to the
# dotted name "torch.channels_last". Pickle protocols from 4 on store dotted names; below 4 the name becomes
# getattr(<module torch>, "channels_last"), and a module cannot be pickled. torch.save's default protocol is 2.
# dtypes, layouts, devices and sizes are saved by either.
#
# What to do: save the format's name, str(format), or pass pickle_protocol=4.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.2.6
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import copy
import io
import pickle

import torch

formats = [torch.contiguous_format, torch.channels_last, torch.channels_last_3d, torch.preserve_format]
for value in formats:
    assert pickle.loads(pickle.dumps(value)) is value
    assert copy.deepcopy(value) is value
    file = io.BytesIO()
    torch.save({"memory_format": value}, file, pickle_protocol=4)
    file.seek(0)
    assert torch.load(file, weights_only=False)["memory_format"] is value
    for protocol in (2, 3):
        try:
            pickle.dumps(value, protocol=protocol)
        except TypeError:
            continue
        raise SystemExit(f"changed: protocol {protocol} writes {value}")
    try:
        torch.save({"memory_format": value}, io.BytesIO())
    except TypeError as error:
        print(f"torch.save of {value}: TypeError: {error}")
        assert "cannot pickle 'module' object" in str(error), error
    else:
        raise SystemExit(f"changed: torch.save writes {value}")
for value in (torch.float16, torch.strided, torch.device("cpu"), torch.Size([2, 3])):
    torch.save({"value": value}, io.BytesIO())
print(f"as described, torch {torch.__version__}")
PY
