"""The channels of workers to the keeper: one of each worker, followed by those of its successors.

A successor's channel is read once all requests of its predecessors are read. So a request that was
under way when its worker died is handled before the successor is given that worker's pairs.
"""

from __future__ import annotations

import select
import socket
import struct
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from pyforwarder.runtime.socket_options import cookie_of

RENEWAL: Final = struct.Struct("=I")  # number of the worker


class Channels:
    """The channels of all workers, which this object closes."""

    def __init__(
        self,
        poll: select.poll,
        socks: Sequence[Sequence[socket.socket]],
        renewals: socket.socket,
        also: Callable[[int, socket.socket], object] | None = None,
    ) -> None:
        """`socks[n]` are worker n's, oldest first; further ones come by `renewals`.

        `also` is called with the worker and another socket, which comes with each of these. The
        channels that are read now are registered with `poll`.
        """
        self._poll = poll
        self._socks = [deque(ends) for ends in socks]
        self._renewals = renewals
        self._also = also
        self._may_renew = True  # the supervisor may send another
        self._workers: dict[int, int] = {}  # descriptor of a channel that is read -> worker
        poll.register(renewals, select.POLLIN)
        self._read_first_ones()

    @property
    def is_over(self) -> bool:
        """Whether no worker can send requests any more."""
        return not self._workers

    def worker_of(self, fd: int) -> int | None:
        """The worker of a channel; None: it is no channel."""
        return self._workers.get(fd)

    def is_renewals(self, fd: int) -> bool:
        """Whether further channels come by this descriptor."""
        return fd == self._renewals.fileno()

    def sock(self, worker: int) -> socket.socket:
        """The channel of a worker that is read now."""
        return self._socks[worker][0]

    def renew(self) -> None:
        """Receive the channels that have come by `renewals`."""
        while self._may_renew:
            try:
                data, fds, _, _ = socket.recv_fds(self._renewals, RENEWAL.size, 2)
            except BlockingIOError:
                break
            if not data:
                self._may_renew = False
                self._poll.unregister(self._renewals)
                break
            socks = [socket.socket(fileno=fd) for fd in fds]
            if len(socks) < 1 + (self._also is not None):
                for one in socks:
                    one.close()
                continue  # no descriptor was left: the worker's death is reported again
            (worker,) = RENEWAL.unpack(data)
            sock = socks[0]
            if self._also is not None:
                self._also(worker, socks.pop())
            for one in socks[1:]:
                one.close()
            known = map(cookie_of, self._socks[worker])
            if cookie_of(sock) in known:
                sock.close()  # sent to the previous keeper, and this one was started with it
            else:
                self._socks[worker].append(sock)
        self._read_first_ones()

    def ended(self, fd: int) -> bool:
        """A channel has ended: read the next one; False: there is none.

        For a worker that has died there is another one, which was sent before the old one was
        closed. For one that closes its channel itself there is none.
        """
        worker = self._workers.pop(fd)
        self._poll.unregister(fd)
        self._socks[worker].popleft().close()
        self.renew()
        return bool(self._socks[worker])

    def _read_first_ones(self) -> None:
        """Also for a worker that had no channel left, and has got another one."""
        for worker, socks in enumerate(self._socks):
            if socks and socks[0].fileno() not in self._workers:
                self._poll.register(socks[0], select.POLLIN)
                self._workers[socks[0].fileno()] = worker
