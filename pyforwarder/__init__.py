"""pyforwarder: a TCP and UDP forwarder that decides by the first packet."""

__version__ = "0.1.0"
