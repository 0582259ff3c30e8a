"""The simplest forwarder that is right, and the same with one fault in it.

It proves that the differential tests pass what is correct and find what is not: a judge that has
never seen a fault is not to be trusted.  One thread and one poll(2) per connection; nothing here
is meant to be fast.
"""

from __future__ import annotations

import contextlib
import enum
import select
import socket
import threading
from types import TracebackType
from typing import Final, Self

from tests.helpers.instruction import ACK
from tests.helpers.peers import read_exactly, reset
from tests.helpers.waiting import DEADLINE_S

_PIECE: Final = 1 << 16
_LOOK_UP_S: Final = 0.05


class Fault(enum.Enum):
    """One thing done wrong, each of them something forwarders have really done."""

    NONE = "none"
    LOSES_A_BYTE = "loses a byte"
    DOUBLES_A_PIECE = "doubles a piece"
    SWAPS_TWO_PIECES = "swaps two pieces"
    LOSES_EARLY_PAYLOAD = "loses payload that came with the instruction"
    ENDS_CLEANLY_AFTER_RESET = "passes a reset on as a clean end of file"
    CLOSES_BOTH_ON_FIRST_FIN = "closes both directions on the first FIN"
    LOSES_TAIL_ON_FIN = "forgets what is not written yet when the FIN comes"
    IGNORES_RESET = "does not pass a reset on"
    IGNORES_FIN = "does not pass a FIN on"


class _Flow:
    def __init__(self, source: socket.socket, target: socket.socket) -> None:
        self.source = source
        self.target = target
        self.pending = b""
        self.held_back = b""
        self.eof = False
        self.fin_passed = False
        self.pieces = 0


class Relay:
    """Accepts instructions on 127.0.0.1 and forwards, with `fault`; `with` starts and stops it."""

    def __init__(self, fault: Fault = Fault.NONE) -> None:
        self.fault = fault
        self._stopping = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self._listener.settimeout(_LOOK_UP_S)
        self.address: tuple[str, int] = self._listener.getsockname()
        self._threads = [threading.Thread(target=self._accept)]

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _value: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join(timeout=DEADLINE_S)
        self._listener.close()

    def _accept(self) -> None:
        while not self._stopping.is_set():
            with contextlib.suppress(TimeoutError):
                client, _ = self._listener.accept()
                client.settimeout(DEADLINE_S)
                thread = threading.Thread(target=self._forward, args=(client,))
                self._threads.append(thread)
                thread.start()

    def _forward(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError, AssertionError):
            length = read_exactly(client, 2)
            destination = read_exactly(client, int(length) - 2)[:-2].decode()
            host, _, port = destination.rpartition(":")
            server = socket.create_connection((host.strip("[]"), int(port)), timeout=DEADLINE_S)
            with server:
                server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                try:
                    client.sendall(ACK)
                    if self.fault is Fault.LOSES_EARLY_PAYLOAD:
                        client.setblocking(False)
                        with contextlib.suppress(BlockingIOError):
                            client.recv(1 << 20)
                    self._move(client, server)
                except (ConnectionResetError, BrokenPipeError):
                    self._pass_reset(client, server)

    def _move(self, client: socket.socket, server: socket.socket) -> None:
        flows = [_Flow(client, server), _Flow(server, client)]
        for sock in (client, server):
            sock.setblocking(False)
        while not self._stopping.is_set() and not all(flow.fin_passed for flow in flows):
            poll = select.poll()
            for flow, back in (flows, flows[::-1]):
                events = 0
                if not flow.eof and not flow.pending:
                    events |= select.POLLIN
                if back.pending:
                    events |= select.POLLOUT
                # After its FIN a socket is readable for ever; only errors are of interest then.
                poll.register(flow.source, events)
            if any(events & select.POLLERR for _, events in poll.poll(_LOOK_UP_S * 1000)):
                raise ConnectionResetError
            for flow in flows:
                self._step(flow, flows)

    def _step(self, flow: _Flow, flows: list[_Flow]) -> None:
        if not flow.eof and not flow.pending:
            try:
                piece = flow.source.recv(_PIECE)
            except BlockingIOError:
                return
            flow.eof = not piece
            flow.pending = self._spoil(flow, piece)
        if flow.pending:
            with contextlib.suppress(BlockingIOError):
                flow.pending = flow.pending[flow.target.send(flow.pending) :]
        if self.fault is Fault.LOSES_TAIL_ON_FIN and flow.pending and self._fin_waits(flow):
            flow.pending, flow.eof = b"", True
        if flow.eof and not flow.pending and not flow.fin_passed:
            flow.fin_passed = True
            if self.fault is not Fault.IGNORES_FIN:
                flow.target.shutdown(socket.SHUT_WR)
            if self.fault is Fault.CLOSES_BOTH_ON_FIRST_FIN:
                for each in flows:
                    each.fin_passed = True

    def _spoil(self, flow: _Flow, piece: bytes) -> bytes:
        if not piece:
            return flow.held_back
        flow.pieces += 1
        match self.fault:
            case Fault.LOSES_A_BYTE if flow.pieces == 2:
                return piece[1:]
            case Fault.DOUBLES_A_PIECE if flow.pieces == 2:
                return piece + piece
            case Fault.SWAPS_TWO_PIECES if flow.pieces == 2:
                flow.held_back = piece
                return b""
            case Fault.SWAPS_TWO_PIECES if flow.held_back:
                piece, flow.held_back = piece + flow.held_back, b""
        return piece

    @staticmethod
    def _fin_waits(flow: _Flow) -> bool:
        poll = select.poll()
        poll.register(flow.source, select.POLLRDHUP)
        return any(events & select.POLLRDHUP for _, events in poll.poll(0))

    def _pass_reset(self, client: socket.socket, server: socket.socket) -> None:
        match self.fault:
            case Fault.ENDS_CLEANLY_AFTER_RESET:
                for sock in (client, server):
                    with contextlib.suppress(OSError):
                        sock.shutdown(socket.SHUT_RDWR)
            case Fault.IGNORES_RESET:
                self._stopping.wait()
            case _:
                for sock in (client, server):
                    with contextlib.suppress(OSError):
                        reset(sock)
