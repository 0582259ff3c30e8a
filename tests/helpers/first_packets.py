"""First packets for tests: what real clients sent, and how a matcher takes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from hypothesis import strategies as st

from pyforwarder.core.first_packet.matcher import Matcher
from pyforwarder.core.first_packet.outcome import NEED_MORE, End, Outcome
from pyforwarder.core.first_packet.table import Terms, build

_RECORDS: Final = json.loads(
    (Path(__file__).parent.parent / "data" / "first_packets.json").read_text()
)
# All turns of a recorded client, without what the server answered in between.
TURNS: Final = {
    name: [bytes.fromhex(turn) for turn in record["turns"]] for name, record in _RECORDS.items()
}
# Its first turn.
CLIENTS: Final = {name: turns[0] for name, turns in TURNS.items()}


def client_hello(name: bytes | None) -> bytes:
    """The shortest ClientHello that asks for this server name, or for none."""
    extensions = b""
    if name is not None:
        entry = b"\0" + len(name).to_bytes(2, "big") + name
        extension = len(entry).to_bytes(2, "big") + entry
        extensions = b"\0\0" + len(extension).to_bytes(2, "big") + extension
    body = b"\3\3" + bytes(32) + b"\0" + b"\0\2\x13\1" + b"\1\0"
    body += len(extensions).to_bytes(2, "big") + extensions
    message = b"\1" + len(body).to_bytes(3, "big") + body
    return b"\x16\3\1" + len(message).to_bytes(2, "big") + message


def matcher(match: object) -> Matcher:
    """The matcher for what stands after `match:`."""
    return build(match, Terms())


def said(match: Matcher | object, data: bytes, end: End = End.OPEN) -> Outcome:
    """What a matcher (or what stands after `match:`) says about these first bytes."""
    built = match if isinstance(match, Matcher) else matcher(match)
    return built.match(data, end, None, 0)


def decided_after(match: Matcher | object, data: bytes) -> tuple[Outcome, int]:
    """The outcome as the bytes come one by one, and how many it took.

    Raises:
        AssertionError: it changed its mind afterwards.
    """
    built = match if isinstance(match, Matcher) else matcher(match)
    answers = [said(built, data[:length]) for length in range(len(data) + 1)]
    after = next((n for n, answer in enumerate(answers) if answer is not NEED_MORE), len(data))
    final = answers[after]
    assert answers[after:] == [final] * (len(answers) - after)
    return final, after


@st.composite
def mutated_clients(draw: st.DrawFn, names: tuple[str, ...] = tuple(CLIENTS)) -> bytes:
    """What a real client sent, with some bytes changed, cut out, doubled, or put in."""
    data = bytearray(CLIENTS[draw(st.sampled_from(names))][:700])
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        match draw(st.integers(0, 3)):
            case 0:
                data[at : at + 1] = bytes([draw(st.integers(0, 255))])
            case 1:
                del data[at : at + draw(st.integers(1, 40))]
            case 2:
                data[at:at] = data[at : at + draw(st.integers(1, 40))]
            case _:
                data[at:at] = draw(st.binary(max_size=20))
    return bytes(data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data)
