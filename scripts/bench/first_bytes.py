"""What a client says first, where rules read it."""

from __future__ import annotations

import ssl

from bench.targets import SERVER_NAME


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
        f"GET / HTTP/1.1\r\nHost: {SERVER_NAME}\r\nUser-Agent: curl/7.88.1\r\nAccept: */*\r\n\r\n"
    ).encode()
