"""Connections that the kernel opens by a client's first packet."""
