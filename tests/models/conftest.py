"""Fixtures: the recorded networks, one after the other."""

from __future__ import annotations

import pytest
from support.recorded_networks import CLASSIFIERS, GLIDE, GUIDED_DIFFUSION, Recorded, load_recorded


@pytest.fixture(params=GLIDE)
def recorded(request: pytest.FixtureRequest) -> Recorded:
    """Every recorded network of GLIDE in turn."""
    return load_recorded(request.param)


@pytest.fixture(params=GUIDED_DIFFUSION)
def guided(request: pytest.FixtureRequest) -> Recorded:
    """Every recorded diffusion model of guided-diffusion in turn."""
    return load_recorded(request.param)


@pytest.fixture(params=CLASSIFIERS)
def classifier(request: pytest.FixtureRequest) -> Recorded:
    """Every recorded classifier in turn."""
    return load_recorded(request.param)


@pytest.fixture(params=(*GLIDE, *GUIDED_DIFFUSION, *CLASSIFIERS))
def network(request: pytest.FixtureRequest) -> Recorded:
    """Every recorded network in turn."""
    return load_recorded(request.param)


@pytest.fixture
def base() -> Recorded:
    """The recorded base network."""
    return load_recorded("glide_base")
