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
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tests.helpers.peers import Server, address_text, dial, read_to_end, unused_port
from tests.helpers.waiting import DEADLINE_S, PATIENCE_S, wait_for

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


def config(*rules: str, more: str = "", options: str = "", first_packet_s: float = 10.0) -> str:
    """A listener with these rules.

    A client's program that does not get a processor for a second is not one that says nothing: only
    tests of those that are silent have them judged sooner.
    """
    lines = "".join(f"      - {rule}\n" for rule in rules)
    return (
        "listeners:\n  - name: main\n    bind: 127.0.0.1:0\n"
        f"    first_packet: {{timeout: {first_packet_s}s}}\n{options}    rules:\n{lines}{more}"
    )


def rule(match: str, server: Server) -> str:
    return f"{{match: {match}, to: '{address_text(server.address)}'}}"


def run(*words: str | Path, stdin: str = "", fails_with: int = 0) -> str:
    """What a program prints; it has to end with this exit code."""
    done = subprocess.run(
        words, input=stdin, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert done.returncode == fails_with, (done.returncode, done.stdout, done.stderr)
    return done.stdout


def curl(*words: str, stdin: str = "", fails_with: int = 0) -> str:
    # Without the environment's proxies, and with no answer from a cache.
    always = ["curl", "-qsS", "--noproxy", "", "--max-time", "10"]
    return run(*always, *words, stdin=stdin, fails_with=fails_with)


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
    # A file takes all that it says; a pipe that nobody reads would stop it after 64 KiB.
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )

        def listens() -> bool:
            if process.poll() is not None:
                output.seek(0)
                raise AssertionError(f"{command[0]} ended: {output.read()}")
            with contextlib.suppress(ConnectionRefusedError):
                dial(("127.0.0.1", port)).close()
                return True
            return False

        try:
            wait_for(listens, " ".join(command))
            yield
        finally:
            process.terminate()
            process.wait(timeout=DEADLINE_S)


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


def nginx_answering(port: int) -> str:
    """An nginx that wants a PROXY header and answers with what it says."""
    who = (
        "$proxy_protocol_addr:$proxy_protocol_port"
        " $proxy_protocol_server_addr:$proxy_protocol_server_port"
    )
    return f'server {{ listen 127.0.0.1:{port} proxy_protocol; return 200 "{who}"; }}\n'


@contextlib.contextmanager
def nginx(
    directory: Path, port: int, *, stream: str = "", http: str = ""
) -> Iterator[tuple[str, int]]:
    """nginx with this in its configuration; `port` is one that it binds."""
    path = directory / f"nginx-{port}.conf"
    path.write_text(
        "load_module /usr/lib/nginx/modules/ngx_stream_module.so;\n"
        f"daemon off;\nmaster_process off;\npid {directory}/nginx-{port}.pid;\n"
        "error_log stderr warn;\nevents { worker_connections 1024; }\n"
        f"stream {{\n{stream}}}\nhttp {{\naccess_log off;\n{http}}}\n"
    )
    with running(["nginx", "-e", "stderr", "-p", str(directory), "-c", str(path)], port):
        yield ("127.0.0.1", port)


# The user and password with which `psql` comes, and the two addresses of the server.
POSTGRES_USER: Final = "app"
POSTGRES_PASSWORD: Final = "s3cret"
POSTGRES_HOSTS: Final = ("127.0.0.1", "127.0.0.2")


@contextlib.contextmanager
def postgres(certificate: Path) -> Iterator[int]:
    """PostgreSQL's server with the databases app_live and other; the port on both addresses.

    It encrypts for clients that want it, and asks everybody for the password.
    """
    # The newest; Debian has one version, other sources have several.
    binaries = max(
        Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name)
    )
    # It refuses to run as root. Not in tmp_path, which is closed to others.
    directory = Path(tempfile.mkdtemp(prefix="postgres-"))
    shutil.copy(certificate, directory / "both.pem")
    (directory / "password").write_text(POSTGRES_PASSWORD)
    for path in (directory, directory / "both.pem", directory / "password"):
        shutil.chown(path, "postgres", "postgres")
        path.chmod(0o700 if path == directory else 0o600)
    server = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
    data = directory / "data"
    port = unused_port()
    settings = {
        "port": port,
        "listen_addresses": ",".join(POSTGRES_HOSTS),
        "unix_socket_directories": "",
        "ssl": "on",
        "ssl_cert_file": f"{directory}/both.pem",
        "ssl_key_file": f"{directory}/both.pem",
        "fsync": "off",
    }
    try:
        run(*server, binaries / "initdb", "-D", data, "-U", POSTGRES_USER, "-A", "scram-sha-256",
            "--pwfile", directory / "password", "-E", "UTF8", "--no-locale", "--no-sync"
        )  # fmt: skip
        words = [word for key, value in settings.items() for word in ("-c", f"{key}={value}")]
        with running([*server, str(binaries / "postgres"), "-D", str(data), *words], port):
            # It listens before it has read its files, and refuses everybody meanwhile.
            ready = [f"{binaries}/pg_isready", "-q", "-h", POSTGRES_HOSTS[0], "-p", str(port)]
            wait_for(
                lambda: subprocess.run(ready, timeout=DEADLINE_S, check=False).returncode == 0,
                "PostgreSQL lets clients in",
            )
            for database in ("app_live", "other"):
                psql((POSTGRES_HOSTS[0], port), f"create database {database}", dbname="postgres")
            yield port
    finally:
        shutil.rmtree(directory)


def psql_command(address: tuple[str, int], query: str, **options: str) -> list[str]:
    """`psql` for one query, without a line of comment; `options` go into the connection string."""
    where = {
        "host": address[0],
        "port": str(address[1]),
        "user": POSTGRES_USER,
        "password": POSTGRES_PASSWORD,
        "dbname": "app_live",
        "connect_timeout": "10",
        **options,
    }
    text = " ".join(f"{key}={value}" for key, value in where.items())
    return ["psql", "-X", "-At", "-v", "ON_ERROR_STOP=1", "-c", query, text]


def psql(address: tuple[str, int], query: str, **options: str) -> str:
    """What `psql` prints for one query."""
    return run(*psql_command(address, query, **options))


@contextlib.contextmanager
def sshd(directory: Path) -> Iterator[tuple[str, int]]:
    """OpenSSH's server, which lets in clients with the key in DIRECTORY/key."""
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
