"""What tests that look at bfloat16 bits need of the interpreter."""

from __future__ import annotations

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    from support.interpreter_bfloat16 import round_to_nearest

    round_to_nearest()
