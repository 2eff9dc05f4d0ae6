"""`python -m fastcfg.parity`: the command `fastcfg parity`."""

import sys

from ..cli import main

if __name__ == "__main__":
    raise SystemExit(main(["parity", *sys.argv[1:]]))
