"""A real etcd of one member, in a directory of its own."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from tests.helpers.peers import unused_port
from tests.helpers.waiting import DEADLINE_S, wait_for

_MEMORY: Final = Path("/dev/shm")
_ROOM_BYTES: Final = 1 << 30  # each takes two files of 64 MB at once


class Etcd:
    """Start it, stop it, start it again with the same data."""

    def __init__(self, directory: Path, *, tls: Tls | None = None, host: str = "127.0.0.1") -> None:
        """It runs in the network that the caller is in when it is started."""
        self._host = host
        self._directory = directory
        self._tls = tls
        scheme = "https" if tls else "http"
        self.port: Final = unused_port()
        self.endpoint: Final = f"{scheme}://{host}:{self.port}"
        self._peer = f"http://127.0.0.1:{unused_port()}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it answers."""
        words = [
            *("--name", "a", "--data-dir", str(self._directory / "data")),
            *("--listen-client-urls", self.endpoint, "--advertise-client-urls", self.endpoint),
            *("--listen-peer-urls", self._peer, "--initial-advertise-peer-urls", self._peer),
            *("--initial-cluster", f"a={self._peer}", "--logger", "zap", "--log-level", "error"),
        ]
        if self._tls is not None:
            words += ["--cert-file", str(self._tls.certificate), "--key-file", str(self._tls.key)]
            words += ["--client-cert-auth", "--trusted-ca-file", str(self._tls.certificate)]
        with (self._directory / "log").open("ab") as log:
            self._process = subprocess.Popen(["etcd", *words], stdout=log, stderr=log)
        wait_for(self._answers, f"etcd answers: {(self._directory / 'log').read_text()}")

    @property
    def pid(self) -> int:
        """Its process."""
        assert self._process is not None
        return self._process.pid

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """It stands still, and goes on afterwards.

        One of its threads takes the signal, and the others run until that one has had a processor
        (kernel/signal.c, do_signal_stop): they are waited for.
        """
        threads = Path(f"/proc/{self.pid}/task")

        def stands_still() -> bool:
            statuses = [path / "status" for path in threads.iterdir()]
            return all("\nState:\tT" in status.read_text() for status in statuses)

        os.kill(self.pid, signal.SIGSTOP)
        try:
            wait_for(stands_still, "etcd stands still")
            yield
        finally:
            os.kill(self.pid, signal.SIGCONT)

    def stop(self) -> None:
        """Kill it; what it has stays."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def empty(self) -> None:
        """Remove all that it has, once it was stopped."""
        assert self._process is None
        shutil.rmtree(self._directory / "data")

    def ctl(self, *words: str, user: str = "") -> str:
        """One command of etcdctl, and what it says.

        Raises:
            subprocess.CalledProcessError: it failed.
        """
        options = ["--endpoints", self.endpoint]
        if self._tls is not None:
            options += ["--cacert", str(self._tls.certificate), "--cert"]
            options += [str(self._tls.certificate), "--key", str(self._tls.key)]
        if user:
            options += ["--user", user]
        done = subprocess.run(
            ["etcdctl", *options, *words],
            env={"ETCDCTL_API": "3", "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=True,
        )
        return done.stdout

    def put(self, key: str, value: dict[str, object]) -> None:
        """Set a key as any client of the store can."""
        self.ctl("put", key, json.dumps(value))

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, (self._directory / "log").read_text()
        with contextlib.suppress(OSError), socket.create_connection((self._host, self.port), 1):
            return True
        return False


class Tls:
    """A certificate for 127.0.0.1 that is its own authority, and its key, readable by root.

    It has no common name: with users, etcd's gateway refuses clients' certificates that have one.
    """

    def __init__(self, directory: Path) -> None:
        self.certificate: Final = directory / "certificate.pem"
        self.key: Final = directory / "key.pem"
        subprocess.run(
            [
                *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt"),
                *("ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-subj", "/O=etcd"),
                *("-addext", "subjectAltName=IP:127.0.0.1"),
                *("-addext", "extendedKeyUsage=serverAuth,clientAuth"),
                *("-keyout", str(self.key), "-out", str(self.certificate)),
            ],
            capture_output=True,
            check=True,
        )
        self.key.chmod(0o600)
        self.certificate.chmod(0o644)


def _memory() -> Path | None:
    """A file system there with room for it, so that it waits for no disk that others write to."""
    has_room = _MEMORY.is_dir() and shutil.disk_usage(_MEMORY).free >= _ROOM_BYTES
    return _MEMORY if has_room else None


@contextlib.contextmanager
def running(
    *, with_tls: bool = False, host: str = "127.0.0.1"
) -> Iterator[tuple[Etcd, Tls | None]]:
    """One that runs, and what its clients show."""
    directory = Path(tempfile.mkdtemp(prefix="pyforwarder-etcd-", dir=_memory()))
    directory.chmod(0o755)  # the certificate is for unprivileged processes, too
    try:
        tls = Tls(directory) if with_tls else None
        etcd = Etcd(directory, tls=tls, host=host)
        etcd.start()
        try:
            yield etcd, tls
        finally:
            etcd.stop()
    finally:
        shutil.rmtree(directory)
