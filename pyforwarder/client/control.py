"""To a forwarder: its control socket, one request and one answer at a time."""

from __future__ import annotations

import json
import os
import socket
import struct
import time
from typing import TYPE_CHECKING, Final, Literal, cast

from pyforwarder.errors import (
    ConfigError,
    ControlError,
    ForwarderError,
    NotRunningError,
    UsageError,
)
from pyforwarder.runtime.instance import DEFAULT_NAME, Instance

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pyforwarder.client.rows import (
        Flushed,
        Json,
        ListenerRow,
        PairRow,
        RuleRow,
        UpstreamRow,
        What,
    )

# A pair is about 400 bytes of JSON: this is room for some 600,000 of them, and an end to what a
# program that is not our daemon could make us hold.
MAX_REPLY_BYTES: Final = 256 << 20
_RECV_BYTES: Final = 1 << 18


class ControlClient:
    """The control socket of one instance.

    Every call is one connection, one request and one answer within `timeout_s` seconds, so a
    client can be kept for as long as one likes and survives a restart of the daemon.

    Every call raises:
        NotRunningError: no daemon of this instance listens.
        UsageError, ConfigError: the daemon cannot use the arguments, or the configuration.
        ControlError: it understood and refused.
        ForwarderError: it did not answer in time or not in our language, or we may not ask.
    """

    def __init__(self, instance: Instance, *, timeout_s: float = 10.0) -> None:
        self.instance = instance
        self._timeout_s = timeout_s

    def ping(self) -> Json:
        """What the daemon says about itself."""
        return self.request("ping")

    def show(self, what: What) -> Json:
        """The rows (or for `stats` the object) behind `show WHAT`, as the daemon sent them."""
        return self.request("show", what=what)

    def pairs(self) -> list[PairRow]:
        """Every pair, in the daemon's order."""
        return cast("list[PairRow]", _rows(self.show("pairs")))

    def listeners(self) -> list[ListenerRow]:
        """Every listener."""
        return cast("list[ListenerRow]", _rows(self.show("listeners")))

    def rules(self) -> list[RuleRow]:
        """Every rule, listener by listener, in the order in which they are tried."""
        return cast("list[RuleRow]", _rows(self.show("rules")))

    def upstreams(self) -> list[UpstreamRow]:
        """Every server of every upstream."""
        return cast("list[UpstreamRow]", _rows(self.show("upstreams")))

    def stats(self) -> dict[str, Json]:
        """Totals since `up`; `closed` counts ended connections by reason."""
        return _object(self.show("stats"))

    def config(self) -> tuple[str, str]:
        """The text of the configuration in force, and where it came from (for messages)."""
        result = _object(self.request("config"))
        return str(result["text"]), str(result["source"])

    def flush(self, ids: Sequence[int]) -> Flushed:
        """Reset these pairs; an id that no pair has is reported, not an error."""
        return _flushed(self.request("flush", ids=list(ids)))

    def flush_all(self) -> Flushed:
        """Reset every pair."""
        return _flushed(self.request("flush", all=True))

    def reload(self) -> dict[str, Json]:
        """Have the configuration read again; after an error the old one stays in force."""
        return _object(self.request("reload"))

    def set_server(self, server: str, state: Literal["drain", "ready"]) -> dict[str, Json]:
        """Let `UPSTREAM/SERVER` take no new pairs (its pairs go on), or new ones again.

        What is so now: the `server`, its `state`, and its `weight`; with 0 it takes none at all.
        """
        return _object(self.request("server", server=server, state=state))

    def down(self, *, now: bool = False) -> dict[str, Json]:
        """Ask the daemon to drain and end (`now`: to reset what is left and end).

        Returns at once; `instance.LockWatch`, made before this call, waits for the end.
        """
        return _object(self.request("down", now=now))

    def forward(self, pid: int, fd_a: int, fd_b: int) -> int:
        """Join two connected sockets of another process, named by its descriptor numbers.

        That process closes its own descriptors; the pair lives on.  Returns the pair's id.
        """
        return _pair_id(self.request("forward", pid=pid, fds=[fd_a, fd_b]))

    def join(self, fd_a: int, fd_b: int) -> int:
        """Join two connected sockets of this process; the daemon gets duplicates.

        The caller closes its own as soon as this returns.  Returns the pair's id.
        """
        return _pair_id(self.request("join", fds_sent=(fd_a, fd_b)))

    def failover(self) -> dict[str, Json]:
        """The fleet's addresses that move: which, which are here, and whether they may come."""
        return _object(self.request("failover"))

    def take_addresses(self) -> list[str]:
        """Have the daemon take them, and announce them; returns those that it did not have."""
        return cast("list[str]", self.request("take_addresses"))

    def give_addresses(self) -> list[str]:
        """Have the daemon give them up; returns those that it had."""
        return cast("list[str]", self.request("give_addresses"))

    def listen_port(self, port: int) -> int:
        """Move the first TCP listener to another port; returns the one in force."""
        result = _object(self.request("listen_port", port=port))
        return cast("int", result.get("port", port))

    def request(self, do: str, *, fds_sent: Sequence[int] = (), **arguments: Json) -> Json:
        """The result of one request; `fds_sent` travel with it as SCM_RIGHTS."""
        line = json.dumps({"do": do, **arguments}, separators=(",", ":")).encode() + b"\n"
        deadline_s = time.monotonic() + self._timeout_s
        with self._connected() as control:
            try:
                self._send(control, line, fds_sent)
                reply_line = self._receive(control, deadline_s)
            except TimeoutError as error:
                raise ForwarderError(
                    f"instance {self.instance.name!r} did not answer within {self._timeout_s:g} s"
                ) from error
            except OSError as error:
                raise ForwarderError(f"{self.instance.control}: {error.strerror}") from error
        try:
            reply = json.loads(reply_line)
        except ValueError as error:
            raise ForwarderError(f"{self.instance.control}: the answer is not JSON") from error
        if not isinstance(reply, dict) or not isinstance(reply.get("ok"), bool):
            raise ForwarderError(f"{self.instance.control}: the answer is not ours")
        if not reply["ok"]:
            raise _error_of(reply)
        return cast("Json", reply.get("result"))

    def _connected(self) -> socket.socket:
        control = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            # A non-blocking connect to a unix socket with a full backlog fails at once with
            # EAGAIN; a blocking one waits for room, for as long as SO_SNDTIMEO says (unix(7)).
            control.setsockopt(
                socket.SOL_SOCKET,
                socket.SO_SNDTIMEO,
                struct.pack("ll", int(self._timeout_s), int(self._timeout_s % 1 * 1_000_000)),
            )
            control.connect(str(self.instance.control))
            control.settimeout(self._timeout_s)
        except (FileNotFoundError, ConnectionRefusedError) as error:
            # nobody bound it, or a killed daemon left it behind
            control.close()
            raise NotRunningError(f"instance {self.instance.name!r} is not running") from error
        except PermissionError as error:
            control.close()
            raise ForwarderError(
                f"{self.instance.control}: permission denied (are you root?)"
            ) from error
        except BlockingIOError as error:
            control.close()
            raise ForwarderError(
                f"instance {self.instance.name!r} took no connection within {self._timeout_s:g} s"
            ) from error
        except OSError as error:
            control.close()
            raise ForwarderError(f"{self.instance.control}: {error.strerror}") from error
        except BaseException:
            control.close()
            raise
        return control

    @staticmethod
    def _send(control: socket.socket, line: bytes, fds: Sequence[int]) -> None:
        sent = socket.send_fds(control, [line], list(fds)) if fds else 0
        # Even nothing is sent by sendall(), and fails if the answer has come and the end behind it.
        if sent < len(line):
            control.sendall(line[sent:])

    @staticmethod
    def _receive(control: socket.socket, deadline_s: float) -> bytes:
        reply = bytearray()
        while True:
            remaining_s = deadline_s - time.monotonic()
            if remaining_s <= 0:
                raise TimeoutError
            control.settimeout(remaining_s)
            chunk = control.recv(_RECV_BYTES)
            end = chunk.find(b"\n")
            if end >= 0:
                return bytes(reply + chunk[:end])
            if not chunk:
                raise ForwarderError("the daemon hung up without an answer")
            reply += chunk
            if len(reply) > MAX_REPLY_BYTES:
                raise ForwarderError(f"the daemon's answer has more than {MAX_REPLY_BYTES} bytes")


def forward(
    sock_a: socket.socket,
    sock_b: socket.socket,
    *,
    instance: str = DEFAULT_NAME,
    timeout_s: float = 10.0,
    environ: Mapping[str, str] = os.environ,
) -> int:
    """Hand two connected stream sockets to the running daemon, which joins them in the kernel.

    Bytes that wait unread in either socket are carried first, so nothing is lost; bytes that this
    program has read already are its own to deliver before it calls.  `sock_a` counts as the
    client (up is from a to b).  On success both socket objects are closed here: the connections
    are the daemon's, which ends them the way their peers do.  On an error both stay open and are
    the caller's as before.

    Returns the pair's id, as `show` prints it.

    Raises:
        NotRunningError, ControlError, UsageError, ForwarderError: see `ControlClient`.
    """
    client = ControlClient(Instance.named(instance, environ), timeout_s=timeout_s)
    pair_id = client.join(sock_a.fileno(), sock_b.fileno())
    sock_a.close()
    sock_b.close()
    return pair_id


def _error_of(reply: Mapping[str, Json]) -> ForwarderError:
    text = str(reply.get("error") or "refused without a word")
    match reply.get("kind"):
        case "config":
            return _config_error(text, reply)
        case "usage":
            return UsageError(text)
        case "internal":
            return ForwarderError(f"the daemon failed: {text}")
        case _:
            return ControlError(text)


def _config_error(text: str, reply: Mapping[str, Json]) -> ConfigError:
    # the daemon's text names line and key already: they are added for programs, not said twice
    line, path = reply.get("line"), reply.get("path")
    error = ConfigError(text)
    error.line = line if isinstance(line, int) else None
    error.path = path if isinstance(path, str) else ""
    return error


def _rows(result: Json) -> list[dict[str, Json]]:
    if not isinstance(result, list) or not all(isinstance(row, dict) for row in result):
        raise ForwarderError("the daemon's answer is no list of rows")
    return cast("list[dict[str, Json]]", result)


def _object(result: Json) -> dict[str, Json]:
    if not isinstance(result, dict):
        raise ForwarderError("the daemon's answer is no object")
    return result


def _flushed(result: Json) -> Flushed:
    return cast("Flushed", {"flushed": [], "unknown": [], **_object(result)})


def _pair_id(result: Json) -> int:
    pair_id = _object(result).get("id")
    if not isinstance(pair_id, int):
        raise ForwarderError("the daemon's answer names no pair")
    return pair_id
