"""What several test files share. The folder above is on pytest's path: `from support.mixture import Mixture`."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"
