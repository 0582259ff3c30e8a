"""What decides does no input or output, and only one file knows bcc."""

from __future__ import annotations

import ast
import functools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pyforwarder

PACKAGE = Path(pyforwarder.__file__).parent

# Decisions apart from input and output (design 7): what bytes mean, and what follows from it.
PURE = [
    *sorted(str(path.relative_to(PACKAGE)) for path in (PACKAGE / "core").rglob("*.py")),
    "runtime/tables.py",
    "cli/rates.py",
    "fleet/failover/ledger.py",
    "fleet/failover/record.py",
]
# Sockets, processes, clocks and the kernel; reading a file is looked for by name below.
IMPURE = {
    *("socket", "_socket", "select", "selectors", "ssl", "asyncio", "subprocess", "threading"),
    *("signal", "fcntl", "mmap", "ctypes", "time", "bcc", "psutil", "pyroute2", "pathlib", "io"),
    "inotify_simple",
}
DOES_IO = {"open", "input", "print", "exec", "eval"}


@functools.cache
def imported_by(path: Path) -> frozenset[str]:
    """The modules that a file imports when it is imported, by their full names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


@pytest.mark.parametrize("name", PURE)
def test_pure_module_imports_no_input_and_output(name: str) -> None:
    imported = imported_by(PACKAGE / name)
    assert not {module.partition(".")[0] for module in imported} & IMPURE


@pytest.mark.parametrize("name", PURE)
def test_pure_module_calls_nothing_that_reads_or_writes(name: str) -> None:
    called = {
        node.func.id
        for node in ast.walk(ast.parse((PACKAGE / name).read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert not called & DOES_IO


@pytest.mark.parametrize("name", PURE)
def test_pure_module_does_not_import_os(name: str) -> None:
    assert "os" not in imported_by(PACKAGE / name)


def test_a_package_imports_none_below_it_in_the_table_of_layers() -> None:
    table = (PACKAGE.parent / "docs" / "architecture.md").read_text().partition("## The layers")[2]
    layers = re.findall(r"^\| `(\w+)/` \|", table.partition("\n## ")[0], re.MULTILINE)
    assert {*layers} == {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    upward = {
        (str(path.relative_to(PACKAGE)), other)
        for number, layer in enumerate(layers)
        for path in (PACKAGE / layer).rglob("*.py")
        for other in layers[number + 1 :]
        if any(f"{name}.".startswith(f"pyforwarder.{other}.") for name in imported_by(path))
    }
    assert upward == set()


def test_pure_modules_bring_neither_sockets_nor_bcc_along() -> None:
    # Also not by way of what they import: a parser that needs a socket module to be imported
    # cannot be tried on its own.
    modules = [f"pyforwarder.{name[:-3].replace('/', '.')}" for name in PURE]
    modules = [name.removesuffix(".__init__") for name in modules]
    program = (
        "import importlib, json, sys\n"
        "before = set(sys.modules)\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "print(json.dumps(sorted(set(sys.modules) - before)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    loaded = set(json.loads(done.stdout))
    some = ("core.connection", "core.routing", "core.policy")
    assert {f"pyforwarder.{name}" for name in some} <= loaded
    assert not loaded & {"socket", "_socket", "select", "bcc", "ctypes", "asyncio", "subprocess"}


def test_one_file_imports_bcc() -> None:
    found = [
        str(path.relative_to(PACKAGE))
        for path in sorted(PACKAGE.rglob("*.py"))
        if {module.partition(".")[0] for module in imported_by(path)} & {"bcc"}
    ]
    assert found == ["datapath/ebpf/_bcc.py"]


def test_nothing_imports_the_file_that_imports_bcc() -> None:
    # It is run as a process of its own: bcc brings a compiler of 100 MB along.
    for path in sorted(PACKAGE.rglob("*.py")):
        assert "pyforwarder.datapath.ebpf._bcc" not in imported_by(path), path


def test_what_a_worker_imports_brings_no_bcc_along() -> None:
    program = (
        "import sys, pyforwarder.worker.process, pyforwarder.supervisor.daemon\n"
        "print('bcc' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert done.stdout == b"False\n"


# Beside the order of the layers.
@pytest.mark.parametrize(
    ("folder", "others"),
    [
        ("core/first_packet", ["core.connection", "core.upstreams"]),
        ("config", ["core.connection"]),
        ("status", ["worker"]),
    ],
)
def test_these_know_nothing_of_those(folder: str, others: list[str]) -> None:
    forbidden = tuple(f"pyforwarder.{other}." for other in others)
    imported = {
        path: {f"{module}." for module in imported_by(path)}
        for path in (PACKAGE / folder).rglob("*.py")
    }
    assert imported
    assert not {
        path for path, names in imported.items() if any(n.startswith(forbidden) for n in names)
    }
