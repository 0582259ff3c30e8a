"""The rows of core/datapaths.py, and that the supervisor makes, loads and ends each by its row.

What workers inherit of splice and sockmap it knows by their classes.
"""

from __future__ import annotations

import ast
import inspect
import pkgutil
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar, Self
from unittest.mock import Mock, call

import pytest

import pyforwarder
from pyforwarder.config import parse_config
from pyforwarder.core.datapaths import (
    DATAPATHS,
    EXPRESS,
    IN_KERNEL,
    NAMES,
    SESSIONS,
    DatapathRow,
    row_of,
)
from pyforwarder.datapath.ebpf.abi import DatapathKind
from pyforwarder.datapath.ebpf.loading import bpf_directory
from pyforwarder.datapath.supervised import Given, KernelDatapath, LoadedPrograms
from pyforwarder.errors import LoadError
from pyforwarder.runtime.counters import Counter
from pyforwarder.status.table import ROWS
from pyforwarder.supervisor import datapaths as supervised
from pyforwarder.supervisor.files import bpffs
from pyforwarder.supervisor.processes.loader import Loaded

EACH = pytest.mark.parametrize("row", DATAPATHS, ids=lambda row: row.name)


def test_the_configuration_may_name_every_datapath_and_auto() -> None:
    assert sorted(NAMES) == sorted(["auto", *(row.name for row in (*DATAPATHS, *EXPRESS))])


@EACH
def test_a_datapath_has_its_number_its_word_and_its_counter(row: DatapathRow) -> None:
    kind = DatapathKind[row.name.upper()]
    assert kind.label == row.name
    said = re.findall(
        r'case PF_(\w+):\n\t\tSAY\(seq, "(\w+) *"\)', (bpf_directory() / "view.c").read_text()
    )
    assert (row.name.upper(), row.name) in said
    rows = [each for each in ROWS if each.stats == f"joined.{row.name}"]
    assert [each.word for each in rows] == [Counter[f"JOINED_{row.name.upper()}"]]


@pytest.mark.parametrize("row", [*DATAPATHS, *SESSIONS, *EXPRESS], ids=lambda row: row.name)
def test_a_datapath_is_proven_as_a_user(row: DatapathRow) -> None:
    assert row_of(row.name) is row
    assert len(inspect.signature(pkgutil.resolve_name(row.proof)).parameters) == 1


@pytest.mark.parametrize("row", IN_KERNEL, ids=lambda row: row.name)
def test_a_datapath_of_the_kernel_is_the_supervisors_to_make(row: DatapathRow) -> None:
    assert issubclass(pkgutil.resolve_name(row.supervised), KernelDatapath)


class Toy(KernelDatapath):
    """Says what is done with it."""

    takes_over = True
    can_pin = True
    made: ClassVar[list[Toy]] = []
    is_wanted: ClassVar[bool] = True

    def __init__(self) -> None:
        self.told = Mock()

    @classmethod
    def make(cls, given: Given) -> Self | None:
        assert given.slots == 64
        if not cls.is_wanted:
            return None
        toy = cls()
        cls.made.append(toy)
        return toy

    def load(self, prove: Callable[[str], str]) -> LoadedPrograms:
        return LoadedPrograms([3, 4], prove("toy"), {"toy_udp": "no"})

    def attach(self, descriptors: Sequence[int]) -> None:
        self.told.attach(list(descriptors))

    def pin(self) -> None:
        self.told.pin()

    def worker_died(self, worker: int) -> None:
        self.told.worker_died(worker)

    def forget_worker(self, worker: int) -> None:
        self.told.forget_worker(worker)

    def close(self) -> None:
        self.told.close()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> supervised.Datapaths:
    """Those of a supervisor whose one datapath of the kernel is the toy."""
    row = DatapathRow("toy", proof=f"{__name__}:prove", supervised=f"{__name__}:Toy")
    monkeypatch.setattr(supervised, "IN_KERNEL", (row,))
    monkeypatch.setattr(bpffs, "enter", Mock())
    monkeypatch.setattr(supervised, "proven", Mock(return_value=None))
    monkeypatch.setattr(supervised, "row_of", lambda name: {"toy": row}[name])
    monkeypatch.setattr(Toy, "made", [])
    return supervised.Datapaths(
        parse_config("", source="test"),
        Mock(workers=1, slots=64),
        pins=tmp_path,
        user=None,
        loop=Mock(),
        log=Mock(),
        close_in_child=Mock(),
    )


def prove(_user: str | None) -> None:
    """Named by the toy's row; `proven` is not the real one here."""


def test_a_row_is_made_loaded_attached_and_closed(made: supervised.Datapaths) -> None:
    (toy,) = Toy.made
    assert made.states["toy"] == "being loaded and proven"
    assert made.in_preparation == ["toy"]
    assert made.must_come_first
    assert "toy" not in made.available
    loaded = made.parts()["toy"]()
    assert loaded.descriptors == [3, 4]
    assert loaded.said["proof"].startswith("passed before")
    made.take("toy", loaded)
    assert made.states["toy"] == "available"
    assert made.states["toy_udp"] == "no"
    assert made.available == ["copy", "toy"]
    assert made.in_preparation == []
    made.pin()
    made.worker_died(0)
    made.forget_worker(0)
    made.close()
    assert toy.told.mock_calls == [
        call.attach([3, 4]),
        call.pin(),
        call.worker_died(0),
        call.forget_worker(0),
        call.close(),
    ]


def test_a_row_that_cannot_be_loaded_is_closed_and_done_without(made: supervised.Datapaths) -> None:
    (toy,) = Toy.made
    made.take("toy", LoadError("not here"))
    assert made.states["toy"] == "not here"
    assert made.available == ["copy"]
    made.pin()
    made.close()
    assert toy.told.mock_calls == [call.close()]


def test_a_reason_that_reads_like_a_state_is_none(made: supervised.Datapaths) -> None:
    """The kernel, or a file of the host, may say anything."""
    made.take("toy", LoadError("available"))
    assert made.states["toy"] == "available"
    assert made.available == ["copy"]


def test_a_row_that_cannot_be_attached_is_closed_and_done_without(
    made: supervised.Datapaths,
) -> None:
    (toy,) = Toy.made
    toy.told.attach.side_effect = LoadError("not at that interface")
    made.take("toy", Loaded([3], {"proof": "", "extras": {}}))
    assert made.states["toy"] == "not at that interface"
    assert toy.told.mock_calls == [call.attach([3]), call.close()]


# Where worker/ and supervisor/ ask which datapath it is, instead of what a row says of it.
NAMED = {
    "supervisor/datapaths.py": "sessions of UDP and express are loaded with splice",
    "supervisor/express/deciding.py": "the rule says so itself",
    "worker/generation.py": "likewise",
    "worker/pressure.py": "a copied pair's buffers are all measured",
    "worker/server.py": "asked of every FIN: an identity costs less than a set",
    "worker/udp/adoption.py": "a copied session's client is known by what was copied",
}


def names_a_datapath(node: ast.expr) -> bool:
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        return node.value.id == "DatapathKind" and node.attr != "NONE"
    return isinstance(node, ast.Constant) and node.value in {"sockmap", "splice", "express"}


def test_no_other_file_asks_for_a_datapath_by_its_name() -> None:
    package = Path(pyforwarder.__file__).parent
    found = {
        str(path.relative_to(package))
        for folder in ("worker", "supervisor")
        for path in (package / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Compare)
        # `"splice" in available` asks what the supervisor has said of it.
        and not isinstance(node.ops[0], ast.In | ast.NotIn)
        and any(map(names_a_datapath, [node.left, *node.comparators]))
    }
    assert found == set(NAMED)
