"""What is said of a loader that had no bcc, or died: the cause, and what to do."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pyforwarder.datapath.ebpf import loading
from pyforwarder.errors import LoadError, Refusal


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
