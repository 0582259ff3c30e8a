"""What README and the pages in docs/ tell people to write and to run."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
PAGES: Final = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    ROOT / "examples" / "README.md",
    ROOT / "bpf" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
EXAMPLES: Final = sorted((ROOT / "examples").glob("*/pyforwarder.yaml"))

# Commands in the order in which tests/kernel/users/test_documents.py plays them: what each one
# returns.
PLAYED: Final = {
    "pyforwarder token --new /etc/pyforwarder/ops.key": 0,
    "pyforwarder check /etc/pyforwarder/default.yaml": 0,
    "pyforwarder check examples/one-port/pyforwarder.yaml": 0,
    "pyforwarder up -c /etc/pyforwarder/default.yaml --detach": 0,
    "pyforwarder connect 10.0.0.7:22 --via gateway.example.com:9999 "
    "--key ops=/etc/pyforwarder/ops.key": 0,
    "pyforwarder show": 0,
    "pyforwarder show stats --json": 0,
    "printf 18127.0.0.1:900102 | pyforwarder explain --file -": 0,
    "pyforwarder explain --hex '16 03 01 02 00 01'": 0,
    "pyforwarder explain -c examples/one-port/pyforwarder.yaml --hex '16 03 01 02 00 01'": 0,
    "pyforwarder reload": 0,
    "pyforwarder flush 12 17": 1,  # nobody has these ids
    "pyforwarder forward 4194304 7 9": 1,  # no process has this number
    "pyforwarder flush --all": 0,
    "pyforwarder down": 0,
    "pyforwarder down --now": 3,  # it is gone already
}
# The same or more is played there.
TESTED_ELSEWHERE: Final = {
    "sudo scripts/prepare test": "scripts/test",
    "scripts/check": "scripts/test",
    "scripts/test tests/unit": ".ci/run",
    "sudo scripts/test tests/kernel/datapath/test_conformance.py": ".ci/run",
    "sudo scripts/run": "scripts/container/fresh",
    "sudo scripts/test": ".ci/run",
    "printf 'hello\\n' | scripts/run connect 127.0.0.1:22": "scripts/container/fresh",
    "sudo scripts/run show": "tests/kernel/daemon/test_operating.py",
    "sudo scripts/run demo": "tests/kernel/users/test_demo.py",
    "sudo scripts/run doctor": "tests/kernel/host/test_attaching.py",
    "pyforwarder doctor": "tests/kernel/host/test_attaching.py",
    "pyforwarder doctor --json": "tests/kernel/users/test_as_a_user.py",
    "pyforwarder up -c /etc/pyforwarder/default.yaml": "tests/kernel/daemon/test_operating.py",
    "pyforwarder show listeners --watch": "tests/unit/test_cli.py",
    "pyforwarder top": "tests/unit/test_cli_top.py",
    "pyforwarder server web/10.0.0.1:443 drain": "tests/kernel/connections/test_servers.py",
    "ssh -o ProxyCommand='pyforwarder connect %h:%p --via gateway.example.com:9999' 10.0.0.5": (
        "tests/kernel/users/test_real_clients.py"
    ),
    "ssh -o ProxyCommand='pyforwarder connect %h:%p --via gateway.example.com:9999 "
    "--key ops=ops.key --aud gate-1' 10.0.0.5": "tests/kernel/users/test_real_clients.py",
    "ip rule add ipproto tcp sport 8080 lookup 100": "tests/kernel/connections/test_transparent.py",
    "ip route add local 0.0.0.0/0 dev lo table 100": "tests/kernel/connections/test_transparent.py",
    "pyforwarder upgrade": "tests/kernel/daemon/test_upgrade.py",
    "systemctl enable --now pyforwarder@default": "scripts/container/systemd",
    "systemctl reload pyforwarder@default": "scripts/container/systemd",
    'pyforwarder fleet put -c /etc/pyforwarder/default.yaml shared.yaml --comment "web moves"': (
        "tests/kernel/fleet/test_fleet.py"
    ),
    "pyforwarder fleet instances -c /etc/pyforwarder/default.yaml": (
        "tests/kernel/fleet/test_fleet.py"
    ),
    "pyforwarder fleet clients -c /etc/pyforwarder/default.yaml": (
        "tests/kernel/fleet/test_limits.py"
    ),
    "pyforwarder fleet history -c /etc/pyforwarder/default.yaml": (
        "tests/kernel/fleet/test_fleet.py"
    ),
    "pyforwarder fleet diff -c /etc/pyforwarder/default.yaml --serial 3": (
        "tests/kernel/fleet/test_fleet.py"
    ),
    "pyforwarder fleet rollback -c /etc/pyforwarder/default.yaml 3": (
        "tests/kernel/fleet/test_fleet.py"
    ),
    "pyforwarder register -c /etc/pyforwarder/default.yaml web 10.0.0.7:443 --ttl 10s": (
        "tests/kernel/fleet/test_fleet.py"
    ),
    "pyforwarder fleet move -c /etc/pyforwarder/default.yaml two": (
        "tests/kernel/fleet/test_move.py"
    ),
    "pyforwarder fleet take": "tests/kernel/fleet/test_move.py",
    "pyforwarder fleet ready": "tests/kernel/fleet/test_move.py",
    "sudo scripts/container/build runtime": "scripts/container/test",
    "sudo scripts/bench/run --quick": "tests/unit/test_bench.py",
    "sudo scripts/bench/run": "tests/unit/test_bench.py",
    "sudo scripts/bench/run --topology veth --scenarios udp --record datagrams": (
        "tests/unit/test_bench.py"
    ),
    "sudo scripts/bench/run --targets direct,haproxy,auto,copy,express --scenarios connect": (
        "tests/unit/test_bench.py"
    ),
    "sudo scripts/bench/run --targets direct,haproxy,auto,copy,express --scenarios connect "
    "--topology veth": "tests/unit/test_bench.py",
}


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int  # of the fence, from 1
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(language: str) -> list[Block]:
    """Every fenced block of that language."""
    found = []
    for page in PAGES:
        text = page.read_text()
        for match in re.finditer(r"^( *)```(\w*)\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL):
            if match[2] == language:
                line = text.count("\n", 0, match.start()) + 1
                name = str(page.relative_to(ROOT))
                found.append(Block(name, line, language, textwrap.dedent(match[3])))
    return found


def commands() -> dict[str, Block]:
    """Every line of every shell block, with the first block that it stands in."""
    found: dict[str, Block] = {}
    for block in blocks("sh"):
        for line in block.text.splitlines():
            if line.strip() and not line.startswith("#"):
                found.setdefault(line.strip(), block)
    return found


def with_files(text: str, directory: Path) -> str:
    """A configuration whose key and password files are there: in `directory`, root's alone."""

    def put(match: re.Match[str]) -> str:
        path = directory / match[1]
        path.write_text("0123456789abcdef0123456789abcdef\n")
        path.chmod(0o600)
        return str(path)

    return re.sub(r"/etc/pyforwarder/([a-z]+\.(?:key|password))", put, text)
