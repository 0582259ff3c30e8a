"""The commands in README and docs/, typed as they stand there; the recipes, against their peers."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from pyforwarder.runtime.slowness import scaled_s
from tests.helpers.daemon import COMMAND
from tests.helpers.documents import PLAYED, ROOT, with_files
from tests.helpers.first_packets import client_hello
from tests.helpers.peers import EchoServer, NameServer, dial, read_to_end
from tests.helpers.programs import Named, running
from tests.helpers.waiting import wait_for

if TYPE_CHECKING:
    from tests.helpers.daemon import Place
    from tests.kernel.conftest import StartForwarder

_GATEWAY: Final = "gateway.example.com:9999"
_CONFIG: Final = """
listeners:
  - bind: 127.0.0.1:9999
    rules:
      - {name: named, match: instruction, allow: [loopback], token: optional}
      - {match: any, reject: reset}
tokens: {keys: {ops: /etc/pyforwarder/ops.key}}
datapath: copy
"""


def test_commands_do_what_the_pages_say(place: Place, tmp_path: Path) -> None:
    (tmp_path / "default.yaml").write_text(_CONFIG.replace("/etc/pyforwarder", str(tmp_path)))
    with EchoServer() as server:

        def play(line: str) -> subprocess.CompletedProcess[str]:
            for name, here in (
                ("/etc/pyforwarder", str(tmp_path)),
                (_GATEWAY, "127.0.0.1:9999"),
                ("10.0.0.7:22", f"127.0.0.1:{server.address[1]}"),
                ("pyforwarder ", shlex.join(map(str, COMMAND)) + " "),
            ):
                line = line.replace(name, here)
            return subprocess.run(
                ["bash", "-c", line],
                cwd=ROOT,
                env=place.environ(),
                input="hello\n",
                capture_output=True,
                text=True,
                timeout=scaled_s(30),
                check=False,
            )

        said = {}
        try:
            for line, code in PLAYED.items():
                done = play(line)
                assert done.returncode == code, (line, done.stdout, done.stderr)
                said[line] = done.stdout
        finally:
            play("pyforwarder down --now")
    wait_for(lambda: not place.processes(), "the daemon has ended")
    (connect,) = [line for line in PLAYED if "--via" in line]
    assert said[connect] == "hello\n"
    assert said["pyforwarder show"].startswith("ID STATE DATAPATH CLIENT")
    assert '"accepted": 1' in said["pyforwarder show stats --json"]
    (explain,) = [line for line in PLAYED if line.startswith("printf")]
    assert "rule named takes it after 18 of 18 bytes, to 127.0.0.1:9001" in said[explain]
    (example,) = [line for line in PLAYED if "explain -c" in line]
    page = (ROOT / "docs" / "protocols.md").read_text()
    for line in filter(None, said[example].splitlines()):
        assert f"\n    {line.rstrip()}\n" in page


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("haproxy.cfg", ["haproxy", "-c", "-f"]),
        ("nginx.conf", ["nginx", "-e", "stderr", "-t", "-c"]),
    ],
)
def test_configurations_of_others_are_right(name: str, command: list[str]) -> None:
    paths = sorted((ROOT / "examples").glob(f"*/{name}"))
    assert len(paths) == 2
    for path in paths:
        done = subprocess.run(
            [*command, path], capture_output=True, text=True, timeout=scaled_s(30), check=False
        )
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("who", ["pyforwarder", "haproxy", "sslh"])
def test_the_recipe_for_one_port_sends_all_alike(
    who: str, tmp_path: Path, start_forwarder: StartForwarder
) -> None:
    recipe = ROOT / "examples" / "one-port"
    begins = {
        "ssh": b"SSH-2.0-test\r\n",
        "https": client_hello(b"www.example.com"),
        "http": b"GET / HTTP/1.1\r\nHost: www.example.com\r\n\r\n",
    }
    with (
        NameServer("ssh", port=22),  # as sshd does, it speaks first
        Named("https", port=8443),
        Named("http", port=8080),
    ):

        def ask() -> None:
            with dial(("127.0.0.1", 443)) as silent:
                for name, first in begins.items():
                    with dial(("127.0.0.1", 443)) as client:
                        client.sendall(first)
                        assert read_to_end(client) == name.encode()
                assert read_to_end(silent) == b"ssh"  # after two seconds

        if who == "pyforwarder":
            text = with_files((recipe / "pyforwarder.yaml").read_text(), tmp_path)
            start_forwarder(text + "datapath: copy\n")  # the quickest to start
            ask()
        else:
            command = {
                "haproxy": ["haproxy", "-db", "-f", str(recipe / "haproxy.cfg")],
                "sslh": ["sslh-select", "-f", "-n", f"-F{recipe / 'sslh.cfg'}"],
            }[who]
            with running(command, 443):
                ask()
