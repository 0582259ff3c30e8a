"""Listeners, servers, names, passwords and headers of connections."""
