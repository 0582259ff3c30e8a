"""Proofs that hold until the next boot, and no longer, and for nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pyforwarder.datapath.attach import choice
from pyforwarder.datapath.ebpf import probing
from pyforwarder.datapath.ebpf.loading import bpf_directory
from pyforwarder.datapath.proof import remembered
from pyforwarder.datapath.proof.selftest import Proof
from pyforwarder.errors import LoadError, Refusal
from pyforwarder.runtime import host, store

PASSED = Proof(True, "", {"a": 0.1}, 0.2)
FAILED = Proof(False, "the kernel moved nothing", {}, 0.2, cause=Refusal.SELF_TEST)


class Prover:
    def __init__(self) -> None:
        self.answer = PASSED
        self.runs = 0

    def __call__(self, _user: str | None) -> Proof:
        self.runs += 1
        return self.answer


@pytest.fixture
def prover(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Prover:
    """With an empty place to remember, and a boot of its own."""
    monkeypatch.setenv(store.VARIABLE, str(tmp_path / "kept"))
    boot(monkeypatch, tmp_path, "first")
    monkeypatch.setattr(choice, "kind", lambda: "tcx")
    monkeypatch.setattr(probing, "reads_kernel", lambda: True)
    return Prover()


def boot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, boot_id: str) -> None:
    (tmp_path / "boot_id").write_text(boot_id + "\n")
    monkeypatch.setattr(remembered, "_BOOT_ID", tmp_path / "boot_id")


def prove(prover: Prover, *, name: str = "splice", user: str = "nobody", anew: bool = False) -> int:
    """How often it has been proven by now."""
    remembered.proven(name, user, prover, anew=anew)
    return prover.runs


def test_what_has_passed_is_not_proven_again(prover: Prover) -> None:
    assert remembered.proven("splice", "nobody", prover, anew=False) == PASSED
    assert remembered.proven("splice", "nobody", prover, anew=False) is None
    assert prover.runs == 1
    assert prove(prover, anew=True) == 2


def test_another_boot_datapath_user_capability_way_or_lockdown_is_proven(
    prover: Prover, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert prove(prover) == 1
    assert prove(prover, name="sockmap") == 2
    assert prove(prover, user="daemon") == 3
    boot(monkeypatch, tmp_path, "second")
    assert prove(prover) == 4
    monkeypatch.setattr(
        host, "missing_capabilities", lambda *_, **__: (host.Capability.CAP_PERFMON,)
    )
    assert prove(prover) == 5
    monkeypatch.setattr(choice, "kind", lambda: "clsact")
    assert prove(prover) == 6
    assert prove(prover) == 6
    monkeypatch.setattr(probing, "reads_kernel", lambda: False)
    assert prove(prover) == 7


def test_a_copy_of_the_code_is_not_proven_again_and_other_code_is(
    prover: Prover, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert prove(prover) == 1
    package, programs = tmp_path / "lib/datapath", tmp_path / "bpf"
    shutil.copytree(remembered._package(), package)
    shutil.copytree(bpf_directory(), programs)
    monkeypatch.setattr(remembered, "_package", lambda: package)
    monkeypatch.setattr(remembered, "bpf_directory", lambda: programs)
    assert prove(prover) == 1
    for number, path in enumerate((package / "splice/abi.py", programs / "splice.h")):
        path.write_text(path.read_text() + "\n")
        assert prove(prover) == 2 + number


def test_failure_is_never_remembered_and_forgets_what_passed(prover: Prover) -> None:
    assert prove(prover) == 1
    prover.answer = FAILED
    for _ in range(2):
        with pytest.raises(LoadError, match="failed its self-test: the kernel moved nothing"):
            prove(prover, anew=True)
    with pytest.raises(LoadError):
        prove(prover)
    assert prover.runs == 4


def test_where_nothing_can_be_kept_it_is_proven_each_time(
    prover: Prover, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(store.VARIABLE, "none")
    assert prove(prover) == 1
    assert prove(prover) == 2
