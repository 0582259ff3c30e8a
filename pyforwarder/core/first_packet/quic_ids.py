"""The connection ids in the headers of QUIC packets, which stay when a client's address changes.

A server chooses the id that its clients put into their short headers, and says it in its own long
headers.  Ids that it gives out later are encrypted, and known to the two of them alone.

Source: RFC 9000 sections 5.1, 7.2, 9 and 17.
"""

from __future__ import annotations

from typing import Final

from pyforwarder.core.first_packet import quic_initial

LONGEST: Final = 20
# Shorter ones could be met by chance.
SHORTEST: Final = 4

_LONG_HEADER: Final = 0x80
# By version, the type of a Retry: the id in it holds for one more Initial only.
_RETRY: Final = {
    number.to_bytes(4, "big"): quic_initial.type_of_retry(number)
    for number in quic_initial.VERSIONS.values()
}


def id_of_server(datagram: bytes | memoryview) -> bytes:
    """The id that a server's datagram says its clients should use; empty: it says none."""
    if len(datagram) < 7 or not datagram[0] & _LONG_HEADER:
        return b""
    retry = _RETRY.get(bytes(datagram[1:5]))
    if retry is None or datagram[0] >> 4 & 3 == retry:
        return b""
    at = 6 + datagram[5]  # behind the client's own
    if at >= len(datagram):
        return b""
    length = datagram[at]
    found = bytes(datagram[at + 1 : at + 1 + length])
    return found if len(found) == length and SHORTEST <= length <= LONGEST else b""


def id_of_client(datagram: bytes | memoryview, length: int) -> bytes:
    """The id that a client's short header says, if ids have that length; empty: it has none."""
    if len(datagram) <= length or datagram[0] & _LONG_HEADER:
        return b""
    return bytes(datagram[1 : 1 + length])
