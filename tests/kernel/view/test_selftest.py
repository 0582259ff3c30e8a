"""What `doctor` says of the view, by each way of making it."""

from __future__ import annotations

import errno
import os
import re

import pytest

from pyforwarder.cli import doctor
from pyforwarder.datapath.ebpf import syscall as bpf
from pyforwarder.supervisor.files.view_selftest import WITHOUT_VIEW, prove_view
from pyforwarder.supervisor.files.view_walks import KSYM, MAP, Walk, walks_of
from tests.helpers.capabilities import State, this_host


@pytest.mark.parametrize(
    "walk",
    [
        pytest.param(MAP, id="map", marks=pytest.mark.needs("map iterators")),
        pytest.param(KSYM, id="ksym", marks=pytest.mark.needs("ksym iterators")),
    ],
)
def test_way_that_works_is_named(walk: Walk) -> None:
    before = len(os.listdir("/proc/self/fd"))
    proof = prove_view([walk])
    assert (proof.walk, proof.detail) == (walk, f"printed by the kernel, by {walk.title}")
    assert len(os.listdir("/proc/self/fd")) == before


def test_first_choice_of_this_host_is_named_with_what_came_before() -> None:
    proof = prove_view()
    if this_host().has("map iterators"):
        assert proof.walk is MAP
        assert proof.detail == "printed by the kernel, by map iterators"
        return
    assert this_host().state("map iterators") is State.REFUSED
    assert proof.walk is KSYM
    assert proof.detail.startswith("printed by the kernel, by the ksym iterator (load show() of")
    assert "this kernel refuses iterators over maps to everybody" in proof.detail
    assert proof.detail.endswith(f"; lockdown is {this_host().lockdown})")
    # The cause and the consequence; and not to be root, which it was.
    alone = prove_view([MAP])
    assert alone.walk is None
    assert "this kernel refuses iterators over maps to everybody" in alone.detail
    assert alone.detail.endswith(WITHOUT_VIEW)
    assert not re.search(r"root|\n|insns", alone.detail)


def test_host_without_a_view_is_told_the_cause_and_the_consequence() -> None:
    proof = prove_view(())
    assert proof.walk is None
    assert proof.detail == f"PYFORWARDER_VIEW=daemon: {WITHOUT_VIEW}"


def test_way_whose_link_is_refused_is_left_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    made = bpf.link_iterator
    refusals = iter([OSError(errno.EPERM, "Operation not permitted")])

    def link_iterator(program_fd: int, map_fd: int | None = None) -> int:
        for refusal in refusals:
            raise refusal
        return made(program_fd, map_fd)

    monkeypatch.setattr(bpf, "link_iterator", link_iterator)
    before = len(os.listdir("/proc/self/fd"))
    first = KSYM._replace(name="first", title="the first")
    proof = prove_view([first, KSYM])
    assert proof.walk is KSYM
    assert proof.detail == (
        "printed by the kernel, by the ksym iterator "
        "(load show_by_visits() of view.c: its link: Operation not permitted)"
    )
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(("said", "good"), [("", True), ("daemon", False)])
def test_doctor_has_a_line_for_it(monkeypatch: pytest.MonkeyPatch, said: str, good: bool) -> None:
    monkeypatch.setenv("PYFORWARDER_VIEW", said)
    finding = doctor._view()
    assert (finding.name, finding.good) == ("view", good)
    assert finding.detail == prove_view(walks_of(os.environ)).detail
