"""The process in which providers run. A provider that crashes ends it alone: the runner starts another one."""

from __future__ import annotations

import os
import signal
import threading
import time
import traceback
from multiprocessing import parent_process
from multiprocessing.connection import Connection
from typing import Any


def serve(pipe: Connection, current: Any, since: Any, device_name: str, threads: int | None, seconds: float) -> None:
    """Measure one workload after the other, until the pipe closes.

    Args:
        pipe: receives (workload, excluded providers with reasons); sends ("record", name, record), and for each
            workload at last "done", "not here", "error" or "lost", with a text.
        current: shared array of characters: the name of the provider that runs.
        since: shared number: when it began, by `time.monotonic`, which all processes share.
        device_name: "cpu" or "cuda".
        threads: of torch; None leaves them.
        seconds: of measuring, as `measure` takes it.
    """
    # Ends this process with the runner, whatever hangs here and however the runner ends.
    threading.Thread(target=_end_with, args=(parent_process(),), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the runner ends this process
    import torch

    from benchmarks.suite.cases import NotHereError
    from benchmarks.suite.measure import DeviceLostError, measure

    if threads is not None:
        torch.set_num_threads(threads)
    device = torch.device(device_name)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())

    def announce(name: str) -> None:
        current.value, since.value = name.encode()[:127], time.monotonic()

    while True:
        try:
            workload, excluded = pipe.recv()
        except EOFError:
            return
        announce("")
        try:
            for name, record in measure(workload, device, seconds, excluded, announce):
                pipe.send(("record", name, record))
            answer = ("done", "", None)
        except DeviceLostError as error:
            pipe.send(("lost", str(error), None))
            return
        except NotHereError as error:
            answer = ("not here", str(error), None)
        except Exception as error:
            traceback.print_exc()
            answer = ("error", " ".join(f"{type(error).__name__}: {error}".split())[:300], None)
        pipe.send(answer)


def _end_with(process: Any) -> None:
    if process is not None:
        process.join()
        os._exit(1)
