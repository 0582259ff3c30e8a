"""`python -m pyforwarder`: the same as the command."""

from __future__ import annotations

from pyforwarder.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
