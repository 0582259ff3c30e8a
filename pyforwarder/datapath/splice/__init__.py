"""The datapath splice: tc programs translate the packets of two connections into each other."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    """What the module of this name had in version 0.1: the datapath's class."""
    if name != "SpliceDatapath":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pyforwarder.datapath.splice.datapath import SpliceDatapath

    return SpliceDatapath
