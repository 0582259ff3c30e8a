"""What a client says first, where rules read it."""

from __future__ import annotations

import ssl
from typing import Final

from bench.targets import SERVER_NAME

# Where the bytes begin that are others in each connection: behind the headers of record and message
# and the version, and behind the slash of the path.
RANDOM_AT: Final = 5 + 4 + 2
PATH_AT: Final = len(b"GET /")


def client_hello() -> bytes:
    """A real ClientHello for our server's name, as OpenSSL writes it: 517 bytes and the like."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    tls = context.wrap_bio(incoming, outgoing, server_hostname=SERVER_NAME)
    try:
        tls.do_handshake()
    except ssl.SSLWantReadError:
        return outgoing.read()
    raise AssertionError("a handshake without a server")


def http_head() -> bytes:
    """The head of a request, as curl writes it."""
    return (
        f"GET /00000000 HTTP/1.1\r\nHost: {SERVER_NAME}\r\n"
        "User-Agent: curl/7.88.1\r\nAccept: */*\r\n\r\n"
    ).encode()
