"""What a rule can match: the parts of docs/protocols.md."""

from __future__ import annotations

from documents.markdown import code, table
from pyforwarder.config.described import words


def protocols(_: str) -> str:
    """A row for each word."""
    return table(
        ("`match:`", "What it is", "Options", "UDP", "Client names the destination"),
        [
            (
                f"[`{word.name}`](#{word.described_as})",
                word.summary,
                ", ".join(map(code, word.options)),
                "yes" if word.in_datagrams else "",
                "yes" if word.names_destination else "",
            )
            for word in words()
        ],
    )


def details(_: str) -> str:
    """A section for each word that is described in a file of its own."""
    return "\n\n".join(
        f"### {word.name}\n\n{word.about}" for word in words() if word.described_as == word.name
    )
