#!/usr/bin/env bash
# diffusers 0.42.1: a scheduler's config, a FrozenDict, is not frozen, and its attributes and items may differ.
#
# Seen: scheduler.config.prediction_type = "v_prediction" is accepted, and so is scheduler.config["clip_sample"] =
# False. Neither changes the other reading: the attribute and the item of one name then differ, also in a deepcopy.
# Steps read the attribute. The next register_to_config(...) builds the config anew from the items, so the assigned
# attribute is gone without a word; from_config(...) reads the items too. update, pop, setdefault and del do raise.
# Assignments are meant to raise as well, but the check asks with hasattr and a string for "__frozen", while the flag,
# set in the class as an attribute, bears the mangled name _FrozenDict__frozen.
#
# What to do: change a config by scheduler.register_to_config(prediction_type=...), which sets both, or by
# from_config(config, prediction_type=...).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.2.6 diffusers==0.42.1
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import copy

import diffusers
import torch
from diffusers import DDIMScheduler


def stepped(scheduler):
    scheduler.set_timesteps(10)
    output = scheduler.step(torch.full((1, 1, 2, 2), 0.25), 500, torch.full((1, 1, 2, 2), 0.5))
    return output.prev_sample


scheduler = DDIMScheduler()
config = scheduler.config
config.prediction_type = "v_prediction"
print(f"assigned attribute: attribute {config.prediction_type!r}, item {config['prediction_type']!r}")
assert (config.prediction_type, config["prediction_type"]) == ("v_prediction", "epsilon")
copied = copy.deepcopy(config)
assert (copied.prediction_type, copied["prediction_type"]) == ("v_prediction", "epsilon")
config["clip_sample"] = False
print(f"assigned item: attribute {config.clip_sample!r}, item {config['clip_sample']!r}")
assert (config.clip_sample, config["clip_sample"]) == (True, False)

assert torch.equal(stepped(scheduler), stepped(DDIMScheduler(prediction_type="v_prediction")))
assert not torch.equal(stepped(scheduler), stepped(DDIMScheduler()))
assert DDIMScheduler.from_config(config).config.prediction_type == "epsilon"
flags = [name for name in vars(config) if "frozen" in name]
assert flags == ["_FrozenDict__frozen"] and not hasattr(config, "__frozen"), flags
for change in (
    lambda: config.update(clip_sample=True),
    lambda: config.pop("clip_sample"),
    lambda: config.setdefault("clip_sample", True),
    lambda: config.__delitem__("clip_sample"),
):
    try:
        change()
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
    else:
        raise SystemExit("changed: a FrozenDict's update, pop, setdefault or del is accepted")

scheduler.register_to_config(steps_offset=1)
config = scheduler.config
print(f"after register_to_config(steps_offset=1): prediction_type {config.prediction_type!r}")
assert (config.prediction_type, config["prediction_type"]) == ("epsilon", "epsilon")
scheduler.register_to_config(prediction_type="v_prediction")
config = scheduler.config
assert (config.prediction_type, config["prediction_type"]) == ("v_prediction", "v_prediction")
print(f"as described, diffusers {diffusers.__version__}")
PY
