"""Programs that people use, as tests start them: clients, servers, and other forwarders.

They come with the packages that scripts/test installs; one that is missing fails its test.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tests.helpers.peers import Server, address_text, dial, read_to_end, unused_port
from tests.helpers.waiting import DEADLINE_S, wait_for

if TYPE_CHECKING:
    from tests.helpers.daemon import Daemon


class WebServer(Server):
    """Answers every request with its name and the request's first line."""

    def __init__(self, name: str, *, context: ssl.SSLContext | None = None) -> None:
        super().__init__(name)
        self._context = context

    def serve(self, sock: socket.socket) -> None:
        if self._context is not None:
            sock = self._context.wrap_socket(sock, server_side=True)
        head = b""
        while b"\r\n\r\n" not in head:
            piece = sock.recv(4096)
            if not piece:
                return
            head += piece
        body = f"{self.name}: {head.partition(b' HTTP')[0].decode()}\n".encode()
        sock.sendall(
            b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
        )
        sock.sendall(body)
        if isinstance(sock, ssl.SSLSocket):
            # With close_notify, without which a client may say that the answer was cut short.
            with contextlib.closing(sock), contextlib.suppress(OSError):
                sock.unwrap()


class Named(Server):
    """Says its name once something has come, and closes."""

    def serve(self, sock: socket.socket) -> None:
        sock.recv(1)
        sock.sendall(self.name.encode())
        sock.shutdown(socket.SHUT_WR)
        read_to_end(sock)


def config(*rules: str, more: str = "", options: str = "") -> str:
    lines = "".join(f"      - {rule}\n" for rule in rules)
    return (
        "listeners:\n  - name: main\n    bind: 127.0.0.1:0\n"
        f"    first_packet: {{timeout: 1s}}\n{options}    rules:\n{lines}{more}"
    )


def rule(match: str, server: Server) -> str:
    return f"{{match: {match}, to: '{address_text(server.address)}'}}"


def run(*words: str | Path, stdin: str = "", fails_with: int = 0) -> str:
    """What a program prints; it has to end with this exit code."""
    done = subprocess.run(
        words, input=stdin, capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    assert done.returncode == fails_with, (done.returncode, done.stdout, done.stderr)
    return done.stdout


def curl(*words: str, fails_with: int = 0) -> str:
    # Without the environment's proxies, and with no answer from a cache.
    return run("curl", "-qsS", "--noproxy", "", "--max-time", "10", *words, fails_with=fails_with)


def at(daemon: Daemon) -> str:
    return address_text(daemon.address)


def make_certificate(directory: Path) -> Path:
    """A key and its self-signed certificate in one file."""
    path = directory / "both.pem"
    run("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
        "-nodes", "-subj", "/CN=test", "-days", "2", "-keyout", path, "-out", f"{path}.crt"
    )  # fmt: skip
    path.write_text(path.read_text() + Path(f"{path}.crt").read_text())
    return path


def server_context(certificate: Path) -> ssl.SSLContext:
    """How a server shows this certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context


@contextlib.contextmanager
def running(command: Sequence[str], port: int) -> Iterator[None]:
    """A server program until the end of the block; it listens on that port of 127.0.0.1."""
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )

    def listens() -> bool:
        assert process.poll() is None, process.stdout.read() if process.stdout else ""
        with contextlib.suppress(ConnectionRefusedError):
            dial(("127.0.0.1", port)).close()
            return True
        return False

    try:
        wait_for(listens, " ".join(command))
        yield
    finally:
        process.terminate()
        process.communicate(timeout=DEADLINE_S)


@contextlib.contextmanager
def haproxy(directory: Path, port: int, sections: str) -> Iterator[tuple[str, int]]:
    """HAProxy with this in its configuration; `port` is one that it binds."""
    path = directory / f"haproxy-{port}.cfg"
    path.write_text(
        "global\n  maxconn 200\ndefaults\n  timeout connect 5s\n  timeout client 10s\n"
        f"  timeout server 10s\n  mode tcp\n{sections}"
    )
    with running(["haproxy", "-db", "-f", str(path)], port):
        yield ("127.0.0.1", port)


WHO: Final = "%[src]:%[src_port] %[dst]:%[dst_port] %[fc_pp_unique_id]"


def answering(port: int) -> str:
    """An HAProxy that wants a PROXY header and answers with what it says."""
    return (
        f"frontend who\n  mode http\n  bind 127.0.0.1:{port} accept-proxy\n"
        f'  http-request return status 200 content-type text/plain lf-string "{WHO}"\n'
    )


@contextlib.contextmanager
def sshd(directory: Path) -> Iterator[tuple[str, int]]:
    """OpenSSH's server, which lets in whoever has the key in DIRECTORY/key."""
    for name in ("host", "key"):
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", directory / name)
    port = unused_port()
    # Privilege separation wants this directory; where a system's own sshd runs it is there already.
    Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    settings = directory / "sshd_config"
    settings.write_text(
        f"ListenAddress 127.0.0.1:{port}\nHostKey {directory}/host\nPidFile none\n"
        f"AuthorizedKeysFile {directory}/key.pub\nStrictModes no\nPermitRootLogin yes\n"
        "PasswordAuthentication no\nUsePAM yes\n"
    )
    sshd_path = shutil.which("sshd") or "/usr/sbin/sshd"
    with running([sshd_path, "-D", "-e", "-f", str(settings)], port):
        yield ("127.0.0.1", port)


def ssh(directory: Path, *words: str, port: int = 22) -> str:
    user = pwd.getpwuid(os.geteuid()).pw_name
    options = {
        "IdentityFile": f"{directory}/key",
        "UserKnownHostsFile": f"{directory}/known",
        "StrictHostKeyChecking": "accept-new",
        "BatchMode": "yes",
        "ConnectTimeout": "10",
    }
    given = [word for key, value in options.items() for word in ("-o", f"{key}={value}")]
    return run(
        "ssh", "-F", "none", *given, "-p", str(port), *words, "-l", user, "127.0.0.1", "echo", "in"
    )
