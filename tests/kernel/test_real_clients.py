"""Programs that people use, through rules that were written for them; HAProxy and sslh beside us.

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

import pytest

from tests.helpers.daemon import COMMAND
from tests.helpers.first_packets import CLIENTS
from tests.helpers.peers import (
    NameServer,
    Server,
    address_text,
    dial,
    read_to_end,
    unused_port,
)
from tests.helpers.waiting import DEADLINE_S, wait_for

if TYPE_CHECKING:
    from tests.helpers.daemon import Daemon
    from tests.kernel.conftest import StartForwarder


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


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A key and its self-signed certificate in one file."""
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
         "-nodes", "-subj", "/CN=test", "-days", "2", "-keyout", path, "-out", f"{path}.crt"],
        check=True, capture_output=True,
    )  # fmt: skip
    path.write_text(path.read_text() + Path(f"{path}.crt").read_text())
    return path


@pytest.fixture
def tls(certificate: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context


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


# TLS and HTTP: the same port, other servers.


def test_openssl_gets_to_the_server_it_names(
    tls: ssl.SSLContext, start_forwarder: StartForwarder
) -> None:
    with (
        WebServer("first", context=tls) as first,
        WebServer("second", context=tls) as second,
        WebServer("h2", context=tls) as h2,
        WebServer("nameless", context=tls) as nameless,
    ):
        forwarder = start_forwarder(
            config(
                rule("{tls: {sni: first.example}}", first),
                rule("{tls: {sni: ['*.second.example']}}", second),
                rule("{tls: {alpn: h2}}", h2),
                rule("tls", nameless),
            )
        )
        for words, name in (
            (["-servername", "first.example"], "first"),
            (["-servername", "FIRST.example", "-tls1_2"], "first"),
            (["-servername", "a.second.example"], "second"),
            (["-servername", "second.example", "-alpn", "http/1.1,h2"], "h2"),
            (["-servername", "second.example"], "nameless"),
            (["-noservername"], "nameless"),
        ):
            client = ["openssl", "s_client", "-quiet", "-connect", at(forwarder), *words]
            answer = run(*client, "-ign_eof", stdin="GET / HTTP/1.0\r\n\r\n")
            assert answer.endswith(f"\n{name}: GET /\n"), words


def test_curl_gets_to_the_host_it_names(
    tls: ssl.SSLContext, start_forwarder: StartForwarder
) -> None:
    with (
        WebServer("api") as api,
        WebServer("site") as site,
        WebServer("tls", context=tls) as secure,
    ):
        forwarder = start_forwarder(
            config(
                rule("{http: {host: api.example, path: ['/v1/*']}}", api),
                rule("{http: {host: ['*.example']}}", site),
                rule("{tls: {sni: www.example}}", secure),
                "{match: any, reject: reset}",
            )
        )
        host, port = forwarder.address
        to = ["--connect-to", f"::{host}:{port}"]
        assert curl(*to, "http://api.example/v1/x") == "api: GET /v1/x\n"
        assert curl(*to, "http://api.example/v2/x") == "site: GET /v2/x\n"
        assert curl(*to, "http://www.example:8080/") == "site: GET /\n"
        assert curl(*to, "-k", "https://www.example/s") == "tls: GET /s\n"
        assert curl(*to, "http://www.example.org/", fails_with=56) == ""  # reset


# The client names the destination.


@pytest.mark.parametrize("scheme", ["socks4", "socks4a", "socks5", "socks5h"])
def test_curl_through_socks(scheme: str, start_forwarder: StartForwarder) -> None:
    with WebServer("web") as web:
        forwarder = start_forwarder(config("{match: socks, allow: ['127.0.0.0/8']}"))
        proxy = ["-x", f"{scheme}://{at(forwarder)}"]
        # SOCKS 4 without `a` and 5 without `h` resolve the name themselves.
        assert curl(*proxy, "-4", f"http://localhost:{web.address[1]}/a") == "web: GET /a\n"
        assert curl(*proxy, f"http://{address_text(web.address)}/b") == "web: GET /b\n"
        # Denied, and nobody there: curl knows it from the proxy's reply.
        curl(*proxy, "http://192.0.2.1/", fails_with=97)
        curl(*proxy, f"http://127.0.0.1:{unused_port()}/", fails_with=97)


def test_curl_through_socks_with_a_password(
    start_forwarder: StartForwarder, tmp_path: Path
) -> None:
    (tmp_path / "alice").write_text("s3cret\n")
    with WebServer("web") as web:
        forwarder = start_forwarder(
            config(
                "{match: socks, allow: [loopback], users: [alice]}",
                more=f"users: {{alice: {tmp_path}/alice}}\n",
            )
        )
        proxy = ["-x", f"socks5h://{at(forwarder)}", f"http://{address_text(web.address)}/"]
        assert curl("-U", "alice:s3cret", *proxy) == "web: GET /\n"
        curl("-U", "alice:secret", *proxy, fails_with=97)
        curl(*proxy, fails_with=97)


def test_curl_through_http_connect(
    tls: ssl.SSLContext, start_forwarder: StartForwarder, tmp_path: Path
) -> None:
    (tmp_path / "alice").write_text("s3cret")
    with WebServer("web") as web, WebServer("tls", context=tls) as secure:
        forwarder = start_forwarder(
            config(
                "{match: http_connect, allow: [loopback], users: [alice]}",
                more=f"users: {{alice: {tmp_path}/alice}}\n",
            )
        )
        proxy = ["-x", f"http://{at(forwarder)}", "-p"]
        good = [*proxy, "-U", "alice:s3cret"]
        assert curl(*good, f"http://{address_text(web.address)}/a") == "web: GET /a\n"
        assert curl(*good, "-k", f"https://localhost:{secure.address[1]}/b") == "tls: GET /b\n"
        code = ["-o", os.devnull, "-w", "%{http_connect}"]
        assert curl(*proxy, *code, "http://127.0.0.1:1/", fails_with=56) == "407"
        assert curl(*good, *code, "http://192.0.2.1/", fails_with=56) == "403"
        assert curl(*good, *code, f"http://127.0.0.1:{unused_port()}/", fails_with=56) == "502"
        assert curl(*good, *code, "http://no.such.name.invalid/", fails_with=56) == "502"


def test_nc_through_socks(start_forwarder: StartForwarder) -> None:
    with NameServer("named") as server:
        forwarder = start_forwarder(config("{match: socks, allow: [loopback]}"))
        host, port = server.address
        assert run("nc", "-X", "5", "-x", at(forwarder), host, str(port)) == "named"


# SSH.


@pytest.fixture
def sshd(tmp_path: Path) -> Iterator[tuple[str, int]]:
    """OpenSSH's server, which lets in whoever has the key in tmp_path/key."""
    for name in ("host", "key"):
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / name)
    port = unused_port()
    # Privilege separation wants this directory; where a system's own sshd runs it is there already.
    Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    settings = tmp_path / "sshd_config"
    settings.write_text(
        f"ListenAddress 127.0.0.1:{port}\nHostKey {tmp_path}/host\nPidFile none\n"
        f"AuthorizedKeysFile {tmp_path}/key.pub\nStrictModes no\nPermitRootLogin yes\n"
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


def test_ssh_beside_others_on_one_port(
    sshd: tuple[str, int], tmp_path: Path, start_forwarder: StartForwarder
) -> None:
    with WebServer("web") as web:
        forwarder = start_forwarder(
            config(f"{{match: ssh, to: '{address_text(sshd)}'}}", rule("http", web))
        )
        assert ssh(tmp_path, port=forwarder.address[1]) == "in\n"
        assert curl(f"http://{at(forwarder)}/") == "web: GET /\n"


def test_ssh_with_our_connect_as_its_proxy_command(
    sshd: tuple[str, int], tmp_path: Path, start_forwarder: StartForwarder
) -> None:
    forwarder = start_forwarder(config("{match: instruction, allow: [loopback]}"))
    command = f"{' '.join(COMMAND)} connect %h:%p --via {at(forwarder)}"
    assert ssh(tmp_path, "-o", f"ProxyCommand={command}", port=sshd[1]) == "in\n"
    # ssh kills its proxy command in the end, so how it ends is chance; that it does is not.
    wait_for(lambda: forwarder.show("stats")["closed"], "the end of the pair")
    forwarder.wait_for_no_pairs()


@pytest.mark.parametrize(
    ("match", "version"), [("socks", "4"), ("socks", "5"), ("http_connect", "connect")]
)
def test_ssh_with_nc_as_its_proxy_command(
    match: str,
    version: str,
    sshd: tuple[str, int],
    tmp_path: Path,
    start_forwarder: StartForwarder,
) -> None:
    forwarder = start_forwarder(config(f"{{match: {match}, allow: [loopback]}}"))
    command = f"nc -X {version} -x {at(forwarder)} %h %p"
    assert ssh(tmp_path, "-o", f"ProxyCommand={command}", port=sshd[1]) == "in\n"


# PROXY headers from and to others.


def test_curl_sends_a_proxy_header(start_forwarder: StartForwarder) -> None:
    with WebServer("web") as web:
        forwarder = start_forwarder(
            config(
                rule("{client: 127.0.0.1, http: {host: '127.0.0.1'}}", web),
                options="    proxy_protocol: {accept: true, trusted: [loopback]}\n",
            )
        )
        assert curl("--haproxy-protocol", f"http://{at(forwarder)}/a") == "web: GET /a\n"
        curl(f"http://{at(forwarder)}/a", fails_with=56)


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


@pytest.mark.parametrize("form", ["v1", "v2"])
def test_haproxy_behind_us_learns_who_the_client_is(
    form: str, tmp_path: Path, start_forwarder: StartForwarder
) -> None:
    port = unused_port()
    with haproxy(tmp_path, port, answering(port)):
        forwarder = start_forwarder(
            config(f"{{match: http, to: '127.0.0.1:{port}', send_proxy: {form}}}")
        )
        local = unused_port()
        answer = curl("--local-port", str(local), f"http://{at(forwarder)}/").split()
        assert answer[:2] == [f"127.0.0.1:{local}", at(forwarder)]
        assert len(answer) == (3 if form == "v2" else 2)


@pytest.mark.parametrize(
    "words", ["send-proxy", "send-proxy-v2", "send-proxy-v2 proxy-v2-options crc32c,unique-id"]
)
@pytest.mark.parametrize("form", ["v1", "v2"])
def test_haproxy_before_and_behind_us(
    words: str, form: str, tmp_path: Path, start_forwarder: StartForwarder
) -> None:
    front, back = unused_port(), unused_port()
    while back == front:
        back = unused_port()
    forwarder = start_forwarder(
        config(
            f"{{match: {{http: null, client: 127.0.0.9}}, to: '127.0.0.1:{back}',"
            f" send_proxy: {form}}}",
            options="    proxy_protocol: {accept: true, trusted: [127.0.0.1]}\n",
        )
    )
    before = (
        f"listen front\n  bind 127.0.0.1:{front}\n  unique-id-format from-the-front\n"
        f"  server us {at(forwarder)} {words}\n"
    )
    with haproxy(tmp_path, back, answering(back)), haproxy(tmp_path, front, before):
        local = unused_port("127.0.0.9")
        answer = curl(
            "--interface", "127.0.0.9", "--local-port", str(local), f"http://127.0.0.1:{front}/"
        ).split()
        assert answer[:2] == [f"127.0.0.9:{local}", f"127.0.0.1:{front}"]


def test_haproxys_own_checks_find_us_up(tmp_path: Path, start_forwarder: StartForwarder) -> None:
    front = unused_port()
    with WebServer("web") as web:
        forwarder = start_forwarder(
            config(
                rule("http", web),
                options="    proxy_protocol: {accept: true, trusted: [loopback]}\n",
            )
        )
        with haproxy(
            tmp_path,
            front,
            f"listen front\n  bind 127.0.0.1:{front}\n"
            f"  server us {at(forwarder)} send-proxy-v2 check inter 100ms rise 1 fall 1\n",
        ):
            wait_for(lambda: forwarder.show("listeners")[0]["accepted"] > 5, "checks")
            assert curl(f"http://127.0.0.1:{front}/") == "web: GET /\n"
            # The header of a check is one; none of them was malformed.
            assert "malformed" not in forwarder.show("stats")["closed"]


# The same first packets to the same servers.


def answer_to(address: tuple[str, int], first: bytes, *rest: bytes) -> bytes:
    """What comes back to these first bytes; b"" for a reset."""
    with dial(address) as sock, contextlib.suppress(ConnectionResetError, BrokenPipeError):
        sock.sendall(first)
        for piece in rest:
            sock.sendall(piece)
        return read_to_end(sock)
    return b""


class Named(Server):
    """Says its name once something has come, and closes."""

    def serve(self, sock: socket.socket) -> None:
        sock.recv(1)
        sock.sendall(self.name.encode())
        sock.shutdown(socket.SHUT_WR)
        read_to_end(sock)


def test_sslh_sends_real_clients_where_we_do(start_forwarder: StartForwarder) -> None:
    port = unused_port()
    with (
        Named("ssh") as ssh_,
        Named("tls") as tls_,
        Named("http") as http,
        Named("xmpp") as xmpp,
        Named("openvpn") as openvpn,
        Named("adb") as adb,
        Named("rest") as rest,
    ):
        named = {"ssh": ssh_, "tls": tls_, "http": http, "xmpp": xmpp, "openvpn": openvpn}
        forwarder = start_forwarder(
            config(
                rule("ssh", ssh_),
                rule("tls", tls_),
                # sslh takes the word HTTP anywhere for HTTP, in the preface of HTTP/2 too.
                rule("[http, http2]", http),
                rule("xmpp", xmpp),
                rule("openvpn", openvpn),
                rule("adb", adb),
                rule("any", rest),
            )
        )
        words = [w for name, s in named.items() for w in (f"--{name}", address_text(s.address))]
        command = ["sslh", "-f", "-n", "-t", "1", "--on-timeout", "anyprot"]
        command += ["-p", f"127.0.0.1:{port}", *words]
        with running([*command, "--adb", address_text(adb.address),
                      "--anyprot", address_text(rest.address)], port):  # fmt: skip
            answers = {
                name: (answer_to(forwarder.address, data), answer_to(("127.0.0.1", port), data))
                for name, data in CLIENTS.items()
            }
    ours = {name: mine for name, (mine, _) in answers.items()}
    assert set(ours.values()) == {b"ssh", b"tls", b"http", b"xmpp", b"openvpn", b"adb", b"rest"}
    differing = {name: both for name, both in answers.items() if both[0] != both[1]}
    # To sslh 1.20 every segment is OpenVPN that begins with its own length, as a DNS query does.
    assert differing == {"dns-dig": (b"rest", b"openvpn")}


@pytest.mark.parametrize("name", ["tls-chrome", "tls-openssl", "tls-openssl-1.2", "tls-gnutls"])
def test_haproxy_reads_the_same_name_at_every_split(
    name: str, tmp_path: Path, start_forwarder: StartForwarder
) -> None:
    data = CLIENTS[name]
    port = unused_port()
    with Named("www") as www, Named("other") as other:
        forwarder = start_forwarder(
            config(rule("{tls: {sni: [www.example.com, gnutls.example.com]}}", www),
                   rule("any", other))
        )  # fmt: skip
        sections = (
            f"frontend f\n  bind 127.0.0.1:{port}\n  tcp-request inspect-delay 5s\n"
            "  tcp-request content accept if { req.ssl_hello_type 1 }\n"
            "  use_backend www if { req.ssl_sni -i www.example.com gnutls.example.com }\n"
            f"  default_backend other\nbackend www\n  server s {address_text(www.address)}\n"
            f"backend other\n  server s {address_text(other.address)}\n"
        )
        with haproxy(tmp_path, port, sections):
            for cut in (1, 3, 5, 6, 43, 100, len(data) // 2, len(data) - 1, len(data)):
                ours = answer_to(forwarder.address, data[:cut], data[cut:])
                theirs = answer_to(("127.0.0.1", port), data[:cut], data[cut:])
                assert ours == theirs == (b"other" if name == "tls-openssl-1.2" else b"www"), cut
