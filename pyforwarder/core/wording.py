"""Counts in sentences for people."""

from __future__ import annotations


def counted(count: int, noun: str) -> str:
    """`1 pair`, `2 pairs`: a noun whose plural has an `s`, and nothing else."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
