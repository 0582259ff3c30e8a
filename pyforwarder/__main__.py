"""`python -m pyforwarder`: the same as the command."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# `python -m` looks for every module in the working directory first, which may be anybody's. (An
# installed command and `python -P` do not.)
if (
    not sys.flags.safe_path
    and sys.path[:1] == [os.getcwd()]
    and Path(sys.path[0]) != Path(__file__).resolve().parent.parent
):
    del sys.path[0]

from pyforwarder.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
