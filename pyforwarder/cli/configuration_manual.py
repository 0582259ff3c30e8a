"""The page pyforwarder.yaml(5), made from the models of the configuration."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from pyforwarder import __version__
from pyforwarder.cli.roff import entries, escape
from pyforwarder.config import described, reference

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pyforwarder.config.reference import Block, Key

_DESCRIPTION: Final = """
The configuration of pyforwarder is one YAML file, given by `pyforwarder up -c FILE`. An empty file
is valid. A mistake names its line and key, and changes nothing. `pyforwarder check FILE` judges a
file, `check --dump FILE` prints it with every default, `pyforwarder explain` tells which rule takes
given first bytes, and `pyforwarder reload` puts a changed file in force.
""".strip()
_EXAMPLE: Final = """
listeners:
  - name: front
    bind: 0.0.0.0:443
    rules:
      - {match: ssh, to: 127.0.0.1:22}
      - {match: {tls: {sni: ["*.example.com"]}}, to: web}
      - {match: any, reject: reset}
upstreams:
  web: {servers: [10.0.0.1:443, 10.0.0.2:443], health: {interval: 5s}}
""".strip()


def configuration_page() -> str:
    """The page in roff: every block with its keys, every word of `match`."""
    lines = [
        f'.TH PYFORWARDER.YAML 5 "" "pyforwarder {escape(__version__)}" "File Formats"',
        ".SH NAME",
        r"pyforwarder.yaml \- configuration of pyforwarder",
        ".SH DESCRIPTION",
        _marked(_DESCRIPTION),
        ".SH VALUES",
        *entries([(kind, meaning) for kind, meaning in reference.KINDS.items()], _marked),
        ".SH KEYS",
    ]
    for block in reference.blocks():
        lines += _block(block)
    lines += [
        '.SH "WHAT A RULE CAN MATCH"',
        _marked(
            "One word, a mapping of words that must all hold, or a list of alternatives; `all`, "
            '`any_of`, `not`, `client: [NETWORK]` and `port: [NUMBER, "FROM-TO"]` combine with any.'
        ),
        *entries([_match(word) for word in described.words()], _marked),
        ".SH EXAMPLE",
        ".nf",
        escape(_EXAMPLE),
        ".fi",
        ".SH FILES",
        *entries([("/etc/pyforwarder/NAME.yaml", "read by the unit pyforwarder@NAME")], _marked),
        '.SH "SEE ALSO"',
        r"\fBpyforwarder\fR(1)",
    ]
    return "\n".join(lines) + "\n"


def _block(block: Block) -> Iterator[str]:
    title = ", ".join(block.paths) if block.paths[0] else "top level"
    yield f'.SS "{escape(title)}"'
    yield _marked(block.summary)
    yield from entries([_key(key) for key in block.keys], _marked)


def _key(key: Key) -> tuple[str, str]:
    written = " | ".join(part for part, _ in key.kinds())
    default = "required" if key.is_required else f"default {key.default}" if key.default else ""
    return key.name, f"({'; '.join(filter(None, [written, default]))}) {key.meaning}"


def _match(word: described.Word) -> tuple[str, str]:
    options = (
        f" Options: {', '.join(f'`{name}`' for name in word.options)}." if word.options else ""
    )
    return word.name, word.summary + options


def _marked(text: str) -> str:
    """Markdown's code in bold, links as their text."""
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", " ".join(text.split()))
    parts = text.split("`")
    return "".join(
        escape(part) if index % 2 == 0 else rf"\fB{escape(part)}\fR"
        for index, part in enumerate(parts)
    )
