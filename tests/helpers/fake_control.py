"""A control server without a daemon: a real unix socket that answers what a test tells it to."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, Self

from pyforwarder.runtime import instance as instances
from tests.helpers.waiting import DEADLINE_S

Request = dict[str, Any]
Answer = Callable[[Request, list[int]], object]

PAIR: Final[Mapping[str, Any]] = {
    "id": 7,
    "state": "joined",
    "datapath": "sockmap",
    "client": "127.0.0.1:40000",
    "listener": "127.0.0.1:9999",
    "source": "127.0.0.1:40001",
    "server": "127.0.0.1:9001",
    "up_bytes": 1023,
    "down_bytes": 23,
    "age_s": 12.75,
    "idle_s": 0.5,
    "rule": "named",
    "decided": "user",
    "reason": "both ends are TCP",
    "up_packets": 3,
    "down_packets": 1,
    "backlog_bytes": 0,
}


class Refusal(Exception):
    """Raised by an `Answer`: the reply is `ok: false` with these fields."""

    def __init__(self, error: str, **fields: object) -> None:
        super().__init__(error)
        self.fields = {"error": error, **fields}


class FakeControl:
    """Listens on `instance.control` and holds the instance's lock, as a daemon does.

    `answer` gets each request and the descriptors that came with it (closed afterwards) and
    returns the result.  `requests` keeps what was asked.
    """

    def __init__(self, instance: instances.Instance, answer: Answer) -> None:
        self.requests: list[Request] = []
        self._answer = answer
        self.lock = instances.acquire(instance)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(instance.control))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                control, _ = self._listener.accept()
            except OSError:  # closed: the end
                return
            # A command that was ended meanwhile takes no answer.
            with control, contextlib.suppress(ConnectionError):
                control.settimeout(DEADLINE_S)
                self._one(control)

    def _one(self, control: socket.socket) -> None:
        data, fds, _, _ = socket.recv_fds(control, 1 << 16, 4)
        while data and not data.endswith(b"\n"):
            data += control.recv(1 << 16)
        if not data:
            return
        request = json.loads(data)
        self.requests.append(request)
        try:
            reply: object = {"ok": True, "result": self._answer(request, fds)}
        except Refusal as refusal:
            reply = {"ok": False, **refusal.fields}
        finally:
            for fd in fds:
                os.close(fd)
        control.sendall(json.dumps(reply).encode() + b"\n")

    def close(self) -> None:
        """Stop answering and drop the lock; the socket's file stays, as after kill -9."""
        if self._listener.fileno() < 0:
            return
        # shutdown wakes accept, which closing alone does not
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(timeout=DEADLINE_S)
        self._listener.close()
        self.lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def make_instance(root: Path, name: str = "default") -> instances.Instance:
    """An instance whose files are all below `root`."""
    return instances.Instance.named(name, environ(root))


def environ(root: Path) -> dict[str, str]:
    """The variables that put both of an instance's directories below `root`."""
    return {
        "PYFORWARDER_RUN_DIR": str(root / "run"),
        "PYFORWARDER_BPFFS": str(root / "bpffs"),
    }
