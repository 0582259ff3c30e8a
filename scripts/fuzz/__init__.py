"""Fuzzing with Atheris; `scripts/fuzz/run` prepares what it needs."""
