"""Kernels with PREEMPT_RT: programs that handle packets may interrupt each other there."""

from __future__ import annotations

import pkgutil
from pathlib import Path

import pytest

from pyforwarder.core.datapaths import DATAPATHS, EXPRESS, SESSIONS
from pyforwarder.errors import Refusal
from pyforwarder.runtime import host

DEBIAN = "#1 SMP PREEMPT_DYNAMIC Debian 6.12.118-1 (2026-03-01)"
DEBIAN_RT = "#1 SMP PREEMPT_RT Debian 6.12.118-1 (2026-03-01)"


@pytest.mark.parametrize(
    ("file", "version", "is_realtime"),
    [
        (None, DEBIAN, False),
        (None, DEBIAN_RT, True),
        ("0\n", DEBIAN, False),
        ("1\n", DEBIAN, True),
        ("1\n", DEBIAN_RT, True),
        (None, "#1 SMP PREEMPT NOT_PREEMPT_RT_AT_ALL", False),
    ],
)
def test_kernel_is_realtime_if_it_says_so_in_one_place_or_the_other(
    tmp_path: Path, file: str | None, version: str, *, is_realtime: bool
) -> None:
    (tmp_path / "kernel").mkdir()
    if file is not None:
        (tmp_path / "kernel/realtime").write_text(file)
    assert host.is_realtime(tmp_path, version) is is_realtime


@pytest.mark.parametrize("name", ["splice", "splice_udp", "express"])
def test_programs_on_packets_are_not_tried_on_a_realtime_kernel(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(host, "is_realtime", lambda: True)
    proofs = {row.name: row.proof for row in (*DATAPATHS, *SESSIONS, *EXPRESS)}
    proof = pkgutil.resolve_name(proofs[name])(None)
    assert (proof.passed, proof.cause, proof.scenarios) == (False, Refusal.REALTIME, {})
    assert str(proof.error()) == (
        "this kernel is built with PREEMPT_RT: programs that handle packets may interrupt each "
        "other, and would mix two connections; `sockmap` and `copy` work here"
    )


def test_copy_is_proven_on_a_realtime_kernel_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "is_realtime", lambda: True)
    proofs = {row.name: row.proof for row in DATAPATHS}
    assert pkgutil.resolve_name(proofs["copy"])(None).passed
