"""`mqtt`: MQTT 3.1, 3.1.1 and 5, by the CONNECT packet.

    mqtt: {client_id: ["sensor-*"]}

Source: OASIS MQTT 3.1.1 section 3.1, MQTT 5 section 3.1; MQTT 3.1 says `MQIsdp` for its name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pyforwarder.core.first_packet import alphabet
from pyforwarder.core.first_packet.cursor import Cursor, ParseError, Truncated
from pyforwarder.core.first_packet.glob import Globs
from pyforwarder.core.first_packet.matcher import Parsed

if TYPE_CHECKING:
    from pyforwarder.core.first_packet.options import Options

_CONNECT: Final = 0x10
_NAMES: Final = {b"MQTT": (4, 5), b"MQIsdp": (3,)}


class Mqtt(Parsed):
    """Matches a CONNECT packet, of one of `client_ids` if they are given."""

    def __init__(self, client_ids: Globs | None = None) -> None:
        self._client_ids = client_ids

    @classmethod
    def from_options(cls, options: Options) -> Mqtt:
        """The matcher for what stands after `mqtt:`.

        Raises:
            OptionError: an unknown option, or an id that no client can send.
        """
        client_ids = alphabet.unicode_texts(options, "client_id")
        options.finish()
        return cls(Globs(client_ids, ignore_case=False) if client_ids else None)

    def _holds(self, cursor: Cursor) -> bool:
        level, left = _read_protocol(cursor)
        if self._client_ids is None:
            return True
        return self._client_ids.include(_read_client_id(cursor, level, left))

    def describe(self, data: bytes) -> str:
        try:
            cursor = Cursor(data)
            return f"client id {_read_client_id(cursor, *_read_protocol(cursor))!r}"
        except (Truncated, ParseError):
            return ""


def _read_protocol(cursor: Cursor) -> tuple[int, int]:
    """The protocol level, and how many bytes of the packet follow it."""
    if cursor.get_uint8() != _CONNECT:
        raise ParseError("not a CONNECT")
    length = _read_varint(cursor)
    start = cursor.position
    name_length = cursor.get_uint16()
    if name_length not in (4, 6):
        raise ParseError("not MQTT's name")
    # Byte by byte, so that a wrong one is known when it comes.
    name = b""
    for _ in range(name_length):
        name += bytes([cursor.get_uint8()])
        if not any(known.startswith(name) for known in _NAMES if len(known) == name_length):
            raise ParseError("not MQTT's name")
    level = cursor.get_uint8()
    # The bit asks a bridge's broker not to mirror messages; Mosquitto's bridges set it.
    if level & 0x7F not in _NAMES[name]:
        raise ParseError("not a version of MQTT")
    left = length - (cursor.position - start)
    if left < 0:
        raise ParseError("the packet ends before its header does")
    return level & 0x7F, left


def _read_client_id(cursor: Cursor, level: int, left: int) -> str:
    start = cursor.position
    if cursor.get_uint8() & 1:
        raise ParseError("a reserved flag is set")
    cursor.skip(2)  # keep alive
    if level == 5:
        cursor.skip(_read_varint(cursor))  # properties
    client_id = cursor.get_bytes(cursor.get_uint16())
    if cursor.position - start > left:
        raise ParseError("the client id reaches beyond the packet")
    try:
        return client_id.decode()
    except UnicodeDecodeError as error:
        raise ParseError("a client id that is not UTF-8") from error


def _read_varint(cursor: Cursor) -> int:
    value = 0
    for shift in (0, 7, 14, 21):
        byte = cursor.get_uint8()
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value
    raise ParseError("a length of more than four bytes")
