#!/usr/bin/env bash
# diffusers 0.42.1: PNDMScheduler with its defaults takes no fewer than four steps, and says so only by NumPy.
#
# Seen: PNDMScheduler().set_timesteps(n) raises for n in 1, 2, 3:
# ValueError: operands could not be broadcast together with shapes (2,) (8,), then (4,) (8,) and (6,) (8,).
# Its first steps are Runge-Kutta steps made of the last four timesteps, and the table for them always has four. From
# four on it works. With skip_prk_steps=True one step and more work.
#
# What to do: check n >= 4 before the call unless scheduler.config.skip_prk_steps.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.2.6 diffusers==0.42.1
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import diffusers
from diffusers import PNDMScheduler

for steps in (1, 2, 3):
    try:
        PNDMScheduler().set_timesteps(steps)
    except ValueError as error:
        print(f"set_timesteps({steps}): ValueError: {error}")
        assert f"could not be broadcast together with shapes ({2 * steps},) (8,)" in str(error), error
    else:
        raise SystemExit(f"changed: {steps} steps are accepted")
for steps in (4, 5, 10):
    PNDMScheduler().set_timesteps(steps)
for steps in (1, 2, 3, 4):
    scheduler = PNDMScheduler(skip_prk_steps=True)
    scheduler.set_timesteps(steps)
    assert len(scheduler.timesteps) == (1 if steps == 1 else steps + 1), scheduler.timesteps
print(f"as described, diffusers {diffusers.__version__}")
PY
