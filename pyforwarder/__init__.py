"""pyforwarder: a TCP and UDP forwarder that decides by the first packet."""

from pyforwarder import _moved

__version__ = "0.2.0"

_moved.install()
