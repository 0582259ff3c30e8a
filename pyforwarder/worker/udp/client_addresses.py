"""UDP sockets that send from their client's own address (`transparent`).

Binding to an address that is not this host's takes a privilege. The supervisor has it, and sets
IP_TRANSPARENT (ip(7)) on the one socket that comes with a request; nobody waits for its answer.
Anybody can have it asked, by a datagram from a made-up address: how many requests are under way at
once, and in a second, is bounded.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Final

# Requests of TCP, which the connector makes, have the smaller numbers.
FIRST_NUMBER: Final = 1 << 62
# The supervisor takes a worker that does not read a thousand answers for a faulty one. An answer
# takes it some 50 us.
_MOST_UNANSWERED: Final = 256
_MOST_PER_S: Final = 2000.0
_MOST_AT_ONCE: Final = 256.0

# Whether the socket may be bound to the client's address; the socket is the callee's.
Granted = Callable[[socket.socket, bool], None]


class ClientAddresses:
    """Has the supervisor make sockets transparent, for one worker."""

    def __init__(self, ask: Callable[[str, list[int], int], None]) -> None:
        """`ask` sends a request with its descriptors and number, and does not wait."""
        self._ask = ask
        self._number = FIRST_NUMBER
        # None: the session has ended, and the answer is still to come.
        self._unanswered: dict[int, tuple[socket.socket, Granted] | None] = {}
        self._tokens = _MOST_AT_ONCE
        self._tokens_s = 0.0

    def ask_for(self, sock: socket.socket, granted: Granted, *, now_s: float) -> int:
        """Ask the supervisor to make the socket transparent: it is ours until `granted` is called
        with it. Returns the request's number, from 1.

        0: so many are asked for that it cannot be now, and the socket stays the caller's.
        """
        grown = self._tokens + (now_s - self._tokens_s) * _MOST_PER_S
        self._tokens, self._tokens_s = min(grown, _MOST_AT_ONCE), now_s
        if self._tokens < 1.0 or len(self._unanswered) >= _MOST_UNANSWERED:
            return 0
        self._tokens -= 1.0
        self._number += 1
        self._unanswered[self._number] = sock, granted
        self._ask("transparent", [sock.fileno()], self._number)
        return self._number

    def give_up(self, number: int) -> None:
        """Close the socket of a request whose session has ended."""
        waiting = self._unanswered.get(number)
        if waiting is not None:
            waiting[0].close()
            self._unanswered[number] = None

    def answered(self, number: int, *, done: bool) -> None:
        """The supervisor's answer to a request."""
        waiting = self._unanswered.pop(number, None)
        if waiting is not None:
            sock, granted = waiting
            granted(sock, done)
