"""What the page answers to `which rule would take these first bytes?`."""

from __future__ import annotations

import secrets
from http import HTTPStatus
from typing import TYPE_CHECKING, Final

from pyforwarder.config.explaining import judge
from pyforwarder.core.address import Address, AddressError, parse_destination
from pyforwarder.core.routing import End
from pyforwarder.errors import ConfigError
from pyforwarder.status.answers import failed, ok, texts_in

if TYPE_CHECKING:
    from pyforwarder.config import Config
    from pyforwarder.status.http import Answer

_FIRST_BYTES: Final = 32768


def explain(config: Config, body: bytes, now_unix_s: float) -> Answer:
    """The answer to the request with this body."""
    asked = texts_in(body, {"listener", "hex", "client", "end"})
    names = [listener.name for listener in config.listeners]
    if asked is None or asked.get("listener") not in names:
        return failed(HTTPStatus.BAD_REQUEST, "there is no such listener")
    index = names.index(asked["listener"])
    text = asked.get("hex", "").replace(":", " ")
    # For UDP each line is a datagram.
    is_udp = config.listeners[index].protocol == "udp"
    lines = [line for line in text.split("\n") if line.strip()] if is_udp else [text]
    # What a person has mistyped is an answer, too, and no failure of the page's.
    try:
        pieces = [bytes.fromhex(line) for line in lines]
    except ValueError:
        return ok({"error": "these are not pairs of hexadecimal digits"})
    if sum(map(len, pieces)) > _FIRST_BYTES:
        return ok({"error": f"at most {_FIRST_BYTES} bytes"})
    client: Address | None = None
    try:
        if "client" in asked:
            named = parse_destination(asked["client"])
            if not isinstance(named, Address):
                raise AddressError("an IP address and a port, not a name")
            client = named
        judged = judge(
            config,
            index,
            pieces,
            client=client,
            port=None,
            end=End(asked.get("end", "open")),
            now_unix_s=now_unix_s,
            # Nobody is to try out passwords and signatures here, so none of them is right.
            keys=None,
            passwords={name: secrets.token_hex().encode() for name in config.users},
            resolve=lambda _: None,
        )
    except (AddressError, ConfigError, ValueError) as error:
        return ok({"error": str(error)})
    return ok({**judged.as_json(), "hex": b"".join(pieces)[: judged.size].hex()})
