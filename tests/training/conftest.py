"""Runs of tests draw no loss curve, which takes 0.3 s, unless the test asks for the fixture `loss_curve`."""

from __future__ import annotations

import pytest


@pytest.fixture
def loss_curve() -> None:
    """Let runs draw their loss curve."""


@pytest.fixture(autouse=True)
def _no_loss_curve(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "loss_curve" not in request.fixturenames:
        monkeypatch.setattr("fastcfg.training.curve.plot", lambda entries, path: None)
