#!/usr/bin/env bash
# diffusers 0.42.1: once a begin index is set, add_noise of the schedulers in noise levels ignores its timesteps.
#
# Seen: after scheduler.set_begin_index(4), as image-to-image pipelines do before they add noise, add_noise(samples,
# noise, timesteps) gives every sample the noise of step 4, whatever timesteps it is called with, and without a word:
# Euler, ancestral Euler, Heun, KDPM2, LMS, DPM-Solver++, UniPC, DEIS. Before that, and with DDIM or DDPM always, every
# sample gets the noise of its own timestep. After the first step it is the noise of the step that comes next.
#
# Who meets it: losses, previews and inpainting that call add_noise with timesteps of their own on a scheduler that a
# pipeline uses. What to do: keep a second scheduler for add_noise, or set_timesteps again, which forgets the index.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.2.6 scipy==1.15.3 diffusers==0.42.1
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import diffusers
import torch

LEVELS = ["Euler", "EulerAncestral", "Heun", "KDPM2", "LMS"]
NAMES = [f"{name}DiscreteScheduler" for name in LEVELS]
NAMES += ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler"]
samples, noise = torch.zeros(2, 1, 2, 2), torch.ones(2, 1, 2, 2)


def added(scheduler, timesteps):
    return scheduler.add_noise(samples, noise, timesteps)[:, 0, 0, 0]


for name in [*NAMES, "DDIMScheduler", "DDPMScheduler"]:
    scheduler = getattr(diffusers, name)()
    scheduler.set_timesteps(10)
    timesteps = scheduler.timesteps[[2, 7]]
    own = added(scheduler, timesteps)
    assert own[0] > own[1], (name, own)
    if not hasattr(scheduler, "set_begin_index"):
        print(f"{name:30} has no begin index: {own.tolist()}")
        continue
    scheduler.set_begin_index(4)
    begun, again = added(scheduler, timesteps), added(scheduler, timesteps.flip(0))
    print(f"{name:30} timesteps 2 and 7: {own.tolist()}, with begin index 4: {begun.tolist()}")
    assert torch.equal(begun, again) and begun[0] == begun[1] and own[0] > begun[0] > own[1], (name, begun)
    if name.startswith(("Euler", "DPM")):
        scheduler.scale_model_input(samples, scheduler.timesteps[4])
        scheduler.step(noise, scheduler.timesteps[4], samples)
        later = added(scheduler, timesteps)
        assert later[0] == later[1] < begun[0], (name, later)
    scheduler.set_timesteps(10)
    assert torch.equal(added(scheduler, timesteps), own)
print(f"as described, diffusers {diffusers.__version__}")
PY
