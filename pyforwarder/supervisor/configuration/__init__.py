"""The configuration of a running daemon: where it comes from, and how it changes."""
