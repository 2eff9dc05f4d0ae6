#!/usr/bin/env bash
# diffusers 0.42.1, torch 2.13.0: under torch.compile a guider's output has items but no attributes.
#
# Seen: in a compiled function, ClassifierFreeGuidance(...).forward(cond, uncond).pred raises AttributeError:
# 'GuiderOutput' object has no attribute 'pred'; with fullgraph=True, torch._dynamo.exc.Unsupported. An output that a
# compiled function returns has no .pred either. ["pred"] and [0] work, and so does .pred without torch.compile.
# Outputs of schedulers are dataclasses, and their attributes can be read. GuiderOutput is annotated like them but is
# no dataclass: it is made as an OrderedDict, whose attributes come to be by its __setitem__. OrderedDict's
# constructor calls that of a subclass; as torch.compile traces it, it does not: a small subclass of OrderedDict
# without diffusers loses its attributes as well.
#
# What to do: read ["pred"], not .pred, of what is made in a compiled function.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.2.6 diffusers==0.42.1
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import dataclasses
from collections import OrderedDict

import diffusers
import torch
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.guiders.guider_utils import GuiderOutput
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput

guider = ClassifierFreeGuidance(guidance_scale=7.5)
cond, uncond = torch.ones(2), torch.zeros(2)
expected = torch.full((2,), 7.5)


class Attributes(OrderedDict):
    def __setitem__(self, name, value):
        super().__setitem__(name, value)
        setattr(self, name, value)


def by_attribute(cond, uncond):
    return guider.forward(cond, uncond).pred


def by_name(cond, uncond):
    return guider.forward(cond, uncond)["pred"]


def by_index(cond, uncond):
    return guider.forward(cond, uncond)[0]


def of_scheduler(cond, uncond):
    return DDIMSchedulerOutput(prev_sample=uncond + 7.5 * cond).prev_sample


def of_dictionary(cond, uncond):
    return Attributes(pred=uncond + 7.5 * cond).pred


def output(cond, uncond):
    return guider.forward(cond, uncond)


def dictionary(cond, uncond):
    return Attributes(pred=uncond + 7.5 * cond)


def compiled(function, fullgraph):
    torch._dynamo.reset()
    return torch.compile(function, backend="eager", fullgraph=fullgraph)(cond, uncond)


assert dataclasses.is_dataclass(DDIMSchedulerOutput) and not dataclasses.is_dataclass(GuiderOutput)
for function in (by_attribute, by_name, by_index, of_scheduler, of_dictionary):
    assert torch.equal(function(cond, uncond), expected), function
for function in (by_name, by_index, of_scheduler):
    for fullgraph in (True, False):
        assert torch.equal(compiled(function, fullgraph), expected), function
    print(f"{function.__name__}: compiled as not compiled")

try:
    compiled(by_attribute, False)
except AttributeError as error:
    print(f"by_attribute: AttributeError: {error}")
    assert "has no attribute 'pred'" in str(error), error
else:
    raise SystemExit("changed: .pred is read under torch.compile")
for function in (by_attribute, of_dictionary):
    try:
        compiled(function, True)
    except torch._dynamo.exc.Unsupported as error:
        print(f"{function.__name__}, fullgraph=True: Unsupported: {str(error).splitlines()[0]}")
    else:
        raise SystemExit(f"changed: {function.__name__} is compiled as one graph")
for function in (output, dictionary):
    assert hasattr(function(cond, uncond), "pred")
    returned = compiled(function, True)
    print(f"{function.__name__}: returns {type(returned).__name__} with .pred: {hasattr(returned, 'pred')}")
    assert torch.equal(returned["pred"], expected) and not hasattr(returned, "pred"), returned
print(f"as described, diffusers {diffusers.__version__}, torch {torch.__version__}")
PY
