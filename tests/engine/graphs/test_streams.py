"""Streams that threads keep for themselves."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch

from fastcfg.engine.graphs import streams

pytestmark = pytest.mark.quick


def test_a_thread_has_one_stream_for_a_purpose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace(device=device))
    monkeypatch.setattr(streams, "_STREAMS", {})
    devices = [torch.device("cuda", index) for index in (0, 1)]
    first = streams.own_stream("capture", devices[0])
    assert first is streams.own_stream("capture", devices[0])
    others = [streams.own_stream("readback", devices[0]), streams.own_stream("capture", devices[1])]
    thread = threading.Thread(target=lambda: others.append(streams.own_stream("capture", devices[0])))
    thread.start()
    thread.join()
    assert len({id(stream) for stream in (first, *others)}) == 4
    assert [stream.device.index for stream in (first, *others)] == [0, 0, 1, 0]
