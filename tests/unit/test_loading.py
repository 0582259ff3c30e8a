"""What is said of a loader that had no bcc, or died, and which programs the kernel is asked for."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from pyforwarder.datapath.ebpf import loading
from pyforwarder.errors import LoadError, Refusal

if TYPE_CHECKING:
    from pyforwarder.datapath.ebpf.loading import ProgramKind


def explained(**answer: object) -> LoadError:
    return loading._explained("x.c", {"ok": False, **answer}, "what the compiler said\n")


def test_without_bcc_the_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_bcc_of_the_host", lambda: "")
    error = explained(step="missing", reason="No module named 'bcc'")
    assert error.cause is Refusal.BCC
    assert "bcc is not installed" in str(error)
    assert "python3-bpfcc" in str(error)
    assert "PyPI's package `bcc` is another project" in str(error)


@pytest.mark.parametrize("seen", ["false", "true"])
def test_bcc_that_an_environment_hides_is_not_called_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seen: str
) -> None:
    monkeypatch.setattr(loading, "_bcc_of_the_host", lambda: "/usr/lib/bcc/__init__.py")
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    settings = tmp_path / "pyvenv.cfg"
    settings.write_text(f"home = /usr/bin\nInclude-System-Site-Packages = {seen}\n")
    error = explained(step="missing", reason="libbcc.so.0: cannot open shared object file")
    assert error.cause is Refusal.BCC
    if seen == "false":
        assert "bcc is installed at /usr/lib/bcc/__init__.py" in str(error)
        assert str(settings) in str(error)
    else:  # the module is there, and its library is not
        assert "libbcc.so.0: cannot open shared object file" in str(error)


def test_another_project_of_that_name_is_told_apart() -> None:
    error = explained(step="foreign", reason="/x/bcc.py")
    assert error.cause is Refusal.BCC
    assert "another project" in str(error)


def test_text_of_the_compiler_is_kept_apart() -> None:
    error = explained(step="compile", reason="Failed to compile BPF module x.c\nmore\n")
    assert error.cause is Refusal.COMPILER
    assert error.log == "what the compiler said\n"
    assert "\n" not in str(error)
    assert "what the compiler said" not in str(error)


def test_refusal_of_bcc_itself_keeps_its_words() -> None:
    error = explained(step="load", reason="Unknown program x", program="x", kind="sk_skb", errno=0)
    assert str(error) == "load x() of x.c: Unknown program x"


@pytest.mark.parametrize(("code", "cause"), [(-9, Refusal.MEMORY), (-11, Refusal.COMPILER)])
def test_loader_that_died_is_no_fault_of_the_kernel(code: int, cause: Refusal) -> None:
    assert loading._died("x.c", code, "").cause is cause


class Verifier:
    """In place of the kernel's: it refuses some programs, and tells what it was asked to take."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *refused: str) -> None:
        self.asked: list[str] = []
        self._refused = refused
        programs: dict[str, bytes] = dict.fromkeys(("a", "b", "c", "d"), b"")
        compiled = SimpleNamespace(programs=programs, licence="GPL")
        monkeypatch.setattr(loading, "compile_programs", lambda *_, **_words: compiled)
        monkeypatch.setattr(loading, "filled", lambda code, **_: code)
        monkeypatch.setattr(loading, "_load", self._load)

    def _load(self, name: str, *_: object) -> int:
        self.asked.append(name)
        if name in self._refused:
            raise PermissionError(errno.EPERM, "Operation not permitted")
        return os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)


def ways(*each: str) -> list[list[tuple[str, ProgramKind]]]:
    return [[(name, "ksym_iterator") for name in way] for way in each]


def test_what_the_kernel_has_taken_for_one_way_is_not_loaded_again_for_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    verifier = Verifier(monkeypatch, "a", "d")
    before = sorted(os.listdir("/proc/self/fd"))
    loaded = loading.load_first("x.c", ways("a", "bcd", "bd", "cb"), defines={})
    assert verifier.asked == ["a", "b", "c", "d"]
    assert (loaded.alternative, len(set(loaded.descriptors))) == (3, 2)
    assert [refused.said["program"] for refused in loaded.refused] == ["a", "d"]
    for descriptor in loaded.descriptors:
        os.close(descriptor)
    assert sorted(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("last", ["d", "bd"])
def test_what_no_way_needs_is_closed(monkeypatch: pytest.MonkeyPatch, last: str) -> None:
    Verifier(monkeypatch, "d")
    before = sorted(os.listdir("/proc/self/fd"))
    with pytest.raises(LoadError):
        loading.load_first("x.c", ways("abd", last), defines={})
    assert sorted(os.listdir("/proc/self/fd")) == before
