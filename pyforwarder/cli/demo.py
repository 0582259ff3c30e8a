"""`pyforwarder demo`: what the forwarder does, shown on this host in some seconds.

One process tree: a server, and for each datapath in turn a daemon of its own (another run
directory, another instance name, a port the kernel chooses) with clients that go through it.  All
of it ends and is removed with the demo, also after an error.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import select
import signal
import socket
import stat
import statistics
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

from pyforwarder.client import ControlClient, connect
from pyforwarder.core.datapaths import DATAPATHS
from pyforwarder.core.wording import counted
from pyforwarder.datapath.ebpf.abi import DatapathKind
from pyforwarder.errors import ForwarderError
from pyforwarder.runtime import children, slowness, tables
from pyforwarder.runtime.instance import Instance
from pyforwarder.runtime.slowness import scaled_s

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pyforwarder.client import PairRow
    from pyforwarder.runtime.environment import Environment

_ROUND_TRIPS: Final = 500
_MESSAGE: Final = b"m" * 64
_BULK_S: Final = 1.0
_BLOCK: Final = b"b" * (256 << 10)
_VERIFIED_BYTES: Final = 8 << 20
_START_DEADLINE_S: Final = 60.0  # compiling the programs takes seconds on a slow host
_IO_DEADLINE_S: Final = 10.0
_END_S: Final = 5.0
_HANDOVER_S: Final = 5.0
_LOOK_AGAIN_S: Final = 0.05

# The first byte of a connection says what the server does with the rest.
_ECHO: Final = b"E"
_COUNT: Final = b"C"  # answers, after the end, with the number of bytes in 8 bytes
_HASH: Final = b"H"  # answers, after the end, with their SHA-256

_CONFIG: Final = """
listeners:
  - name: main
    bind: 127.0.0.1:0
    rules: [{name: demo, match: instruction, allow: [loopback]}]
"""


class BrokenDatapathError(ForwarderError):
    """Bytes that were sent did not arrive as they were."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What the clients of one way to the server found."""

    round_trip_s: float  # median
    bytes_per_s: float


def run(env: Environment) -> int:
    """Show every datapath that works here beside a direct connection.

    0 if all that started carried every byte, 1 if one of them did not.

    Raises:
        ForwarderError: no datapath worked.
    """
    results: list[tuple[str, Measured | str]] = []
    is_broken = False
    with (
        _server() as server,
        tempfile.TemporaryDirectory(prefix="demo-", dir=_scratch()) as directory,
    ):
        env.say(f"a server on 127.0.0.1:{server[1]}; first without a forwarder")
        results.append(("direct", _measure(lambda: socket.create_connection(server))))
        for datapath in (row.name for row in reversed(DATAPATHS)):
            env.say(f"now through a forwarder, datapath {datapath}")
            try:
                results.append((datapath, _through(env, Path(directory), datapath, server)))
            except BrokenDatapathError as error:
                is_broken = True
                results.append((datapath, f"IS BROKEN HERE: {error}"))
            except OSError as error:  # a reset, a deadline
                is_broken = True
                results.append((datapath, f"IS BROKEN HERE: {error.strerror or error}"))
            except ForwarderError as error:
                results.append((datapath, f"does not work here: {error}"))
    env.stdout.write("\n" + _table(results))
    env.stdout.flush()
    if is_broken:
        return 1
    if not any(isinstance(result, Measured) for name, result in results if name != "direct"):
        raise ForwarderError("no datapath works here; `pyforwarder doctor` tells more")
    return 0


def _table(results: list[tuple[str, Measured | str]]) -> str:
    rows: list[dict[str, object]] = []
    for name, result in results:
        if isinstance(result, str):
            rows.append({"datapath": name, "note": result})
            continue
        rows.append(
            {
                "datapath": name,
                "round_trip_us": round(result.round_trip_s * 1e6),
                "mib_per_s": round(result.bytes_per_s / (1 << 20)),
                "note": f"{_VERIFIED_BYTES >> 20} MiB verified, half-close kept",
            }
        )
    columns = ("DATAPATH", "ROUND_TRIP_US", "MIB_PER_S", "NOTE")
    return tables.table(columns, rows, last_is_prose=True)


# ---------------------------------------------------------------------- the clients


def _measure(
    dial: Callable[[], socket.socket], show: Callable[[], None] = lambda: None
) -> Measured:
    """Use three connections; `show` is called while all of them are open."""
    with dial() as echo, dial() as count, dial() as verify:
        for connection in (echo, count, verify):
            connection.settimeout(scaled_s(_IO_DEADLINE_S))
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        round_trip_s = _round_trips(echo)
        bytes_per_s = _bulk(count)
        _verify(verify, show)
    return Measured(round_trip_s, bytes_per_s)


def _round_trips(connection: socket.socket) -> float:
    connection.sendall(_ECHO)
    took_s = []
    for _ in range(_ROUND_TRIPS):
        began_s = time.perf_counter()
        connection.sendall(_MESSAGE)
        _exactly(connection, len(_MESSAGE))
        took_s.append(time.perf_counter() - began_s)
    return statistics.median(took_s)


def _bulk(connection: socket.socket) -> float:
    """Bytes per second until the server has counted the last one."""
    connection.sendall(_COUNT)
    sent = 0
    began_s = time.perf_counter()
    while time.perf_counter() - began_s < _BULK_S:
        connection.sendall(_BLOCK)
        sent += len(_BLOCK)
    connection.shutdown(socket.SHUT_WR)
    counted = int.from_bytes(_exactly(connection, 8), "big")
    took_s = time.perf_counter() - began_s
    if counted != sent:
        raise BrokenDatapathError(f"{sent} bytes were sent and {counted} arrived")
    return sent / took_s


def _verify(connection: socket.socket, show: Callable[[], None]) -> None:
    """Send random bytes, close that direction, get their hash back the other way."""
    data = os.urandom(_VERIFIED_BYTES)
    connection.sendall(_HASH + data)
    show()
    connection.shutdown(socket.SHUT_WR)
    if _exactly(connection, 32) != hashlib.sha256(data).digest() or connection.recv(1):
        raise BrokenDatapathError("bytes arrived damaged")


def _exactly(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        chunk = connection.recv(count - len(data))
        if not chunk:
            raise BrokenDatapathError(
                f"the connection ended {counted(count - len(data), 'byte')} early"
            )
        data += chunk
    return data


# ---------------------------------------------------------------------- the forwarder


def _through(env: Environment, directory: Path, datapath: str, server: tuple[str, int]) -> Measured:
    with _forwarder(env, directory, datapath) as (via, instance):
        control = ControlClient(instance)

        def show() -> None:
            rows = _once_they_are_on(datapath, control.pairs)
            env.stdout.write(tables.render("pairs", rows))
            env.stdout.flush()
            _check_datapath(rows, datapath)

        return _measure(lambda: connect(f"{server[0]}:{server[1]}", via=via), show)


def _once_they_are_on(wanted: str, pairs: Callable[[], list[PairRow]]) -> list[PairRow]:
    """The pairs, once all of them are on the datapath that was asked for, or are to stay off it.

    Bytes flow before the handover has come to its end, and on a slow host one may be seen there.
    """
    deadline_s = time.monotonic() + scaled_s(_HANDOVER_S)
    while True:
        rows = pairs()
        if all(row["datapath"] == wanted for row in rows) or time.monotonic() >= deadline_s:
            return rows
        time.sleep(_LOOK_AGAIN_S)


def _check_datapath(rows: list[PairRow], wanted: str) -> None:
    """Fail if pairs went another way than was asked for: their rate would be another's."""
    for row in rows:
        if row["datapath"] == wanted:
            continue
        if row["datapath"] == DatapathKind.NONE.label:
            raise ForwarderError(f"a pair was on no datapath after {scaled_s(_HANDOVER_S):g} s")
        raise ForwarderError(f"pairs went by {row['datapath']}: {row['reason']}")


def _scratch() -> str:
    """Where to make a directory that nobody else can put another in the place of."""
    chosen = tempfile.gettempdir()
    status = os.stat(chosen)
    is_shared = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not status.st_mode & stat.S_ISVTX
    return "/tmp" if is_shared or status.st_uid not in (0, os.geteuid()) else chosen


@contextlib.contextmanager
def _forwarder(env: Environment, directory: Path, datapath: str) -> Iterator[tuple[str, Instance]]:
    """A daemon with this datapath: where it listens, and its instance; gone afterwards."""
    variables = {
        **{name: word for name, word in env.environ.items() if name.startswith("PYFORWARDER_")},
        "PYFORWARDER_RUN_DIR": str(directory),
    }
    instance = Instance.named(f"demo-{os.getpid()}", variables)
    config = directory / "demo.yaml"
    config.write_text(_CONFIG)
    words = ["up", "--instance", instance.name, "-c", str(config), "--datapath", datapath]
    with tempfile.TemporaryFile("w+") as complaints:
        process = children.start(
            children.python("pyforwarder", *words),
            variables=variables,
            stdout=subprocess.PIPE,
            stderr=complaints,
        )
        try:
            via = _listening_on(process)
            if via is None:
                complaints.seek(0)
                lines = [line.strip() for line in complaints if line.strip()]
                raise ForwarderError(
                    lines[0].removeprefix("pyforwarder: ") if lines else "it ended without a word"
                )
            yield via, instance
        finally:
            _end(process)


def _listening_on(process: subprocess.Popen[bytes]) -> str | None:
    """The address in the daemon's first line; None if it ended instead."""
    assert process.stdout is not None
    output = b""
    timeout_s = scaled_s(_START_DEADLINE_S)
    deadline_s = time.monotonic() + timeout_s
    while b"\n" not in output:
        remaining_s = deadline_s - time.monotonic()
        if remaining_s <= 0 or not select.select([process.stdout], [], [], remaining_s)[0]:
            raise ForwarderError(f"it is not ready after {timeout_s:g} s; {slowness.advice()}")
        chunk = os.read(process.stdout.fileno(), 4096)
        if not chunk:
            return None
        output += chunk
    line = output.partition(b"\n")[0].decode()
    return line.removeprefix("listening on ").split(" ")[0]


def _end(process: subprocess.Popen[bytes]) -> None:
    """Drain and end the daemon, which removes its own files; then at once, then kill it."""
    assert process.stdout is not None
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
        process.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=scaled_s(_END_S))
            break
    process.stdout.close()


# ---------------------------------------------------------------------- the server


@contextlib.contextmanager
def _server() -> Iterator[tuple[str, int]]:
    """A server in a process of its own, so that it does not share this one's interpreter lock."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        pid = children.fork(lambda: _serve(listener))
        try:
            yield "127.0.0.1", listener.getsockname()[1]
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _serve(listener: socket.socket) -> NoReturn:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for our parent, which ends us
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=_serve_one, args=(connection,), daemon=True).start()


def _serve_one(connection: socket.socket) -> None:
    with connection, contextlib.suppress(OSError):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        task = connection.recv(1)
        count = 0
        digest = hashlib.sha256()
        buffer = bytearray(len(_BLOCK))
        view = memoryview(buffer)
        while length := connection.recv_into(buffer):
            count += length
            if task == _ECHO:
                connection.sendall(view[:length])
            elif task == _HASH:
                digest.update(view[:length])
        if task == _COUNT:
            connection.sendall(count.to_bytes(8, "big"))
        elif task == _HASH:
            connection.sendall(digest.digest())
