"""A name server that answers what a test says, and the surroundings that make a daemon ask it."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_LOOK_UP_S: Final = 0.05
_A, _AAAA = 1, 28
_NXDOMAIN: Final = 3
_HOSTS: Final = (
    "127.0.0.1 localhost\n::1 localhost\n127.0.0.1 from-hosts.example\n"
    "127.0.0.1 two.hosts.example\n198.51.100.9 two.hosts.example\n"
)


class DnsServer:
    """Answers on 127.0.0.1:53 of the present network namespace, in a thread.

    Names below `silent` are never answered, other names that are not in `hosts` do not exist.
    """

    def __init__(self, hosts: dict[str, list[str]], *, silent: str = "silent.example") -> None:
        self.hosts = hosts
        self.silent = silent
        self.is_silent = False  # for every name
        self.asked: list[str] = []
        self._sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        self._sock.bind(("127.0.0.1", 53))
        self._sock.settimeout(_LOOK_UP_S)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while not self._stop.is_set():
            try:
                query, client = self._sock.recvfrom(4096)
            except TimeoutError:
                continue
            answer = self._answer(query)
            if answer:
                self._sock.sendto(answer, client)

    def _answer(self, query: bytes) -> bytes:
        labels, at = [], 12
        while size := query[at]:
            labels.append(query[at + 1 : at + 1 + size].decode().lower())
            at += 1 + size
        name, kind = ".".join(labels), int.from_bytes(query[at + 1 : at + 3], "big")
        self.asked.append(name)
        if self.is_silent or name == self.silent or name.endswith("." + self.silent):
            return b""
        hosts = self.hosts.get(name)
        records = b""
        count = 0
        for host in hosts or ():
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            if kind == (_AAAA if family == socket.AF_INET6 else _A):
                data = socket.inet_pton(family, host)
                records += b"\xc0\x0c" + kind.to_bytes(2, "big") + b"\0\1\0\0\0\1"
                records += len(data).to_bytes(2, "big") + data
                count += 1
        code = 0 if hosts is not None else _NXDOMAIN
        flags = (0x8180 | code).to_bytes(2, "big")
        head = query[:2] + flags + b"\0\1" + count.to_bytes(2, "big") + bytes(4)
        return head + query[12 : at + 5] + records

    def close(self) -> None:
        """Answer no more."""
        self._stop.set()
        self._thread.join()
        self._sock.close()


@contextlib.contextmanager
def dns_server(hosts: dict[str, list[str]]) -> Iterator[DnsServer]:
    """One that is closed afterwards."""
    with contextlib.closing(DnsServer(hosts)) as server:
        yield server


def asking_it(directory: Path, *, nsswitch: str = "files dns") -> list[str]:
    """What to start a command with, so that it asks a `DnsServer` and nothing else of the host."""
    mounts = []
    for path, text in (
        ("/etc/resolv.conf", "nameserver 127.0.0.1\nsearch in-search.example\n"),
        ("/etc/hosts", _HOSTS),
        ("/etc/nsswitch.conf", f"hosts: {nsswitch}\npasswd: files\ngroup: files\n"),
    ):
        ours = directory / Path(path).name
        ours.write_text(text)
        ours.chmod(0o644)
        mounts.append(f"mount --bind '{ours}' \"$(readlink -f {path})\"")
    directory.chmod(0o755)
    return ["unshare", "-m", "sh", "-c", " && ".join([*mounts, 'exec "$@"']), "sh"]
