"""How much our programs take of what the verifier allows.

It goes through a million instructions at most (BPF_COMPLEXITY_LIMIT_INSNS, linux/bpf.h). Older
kernels see fewer of the states of a program as equal: of `ingress` 6.1 goes through three times as
many instructions as 6.18, and has refused what took 293,000 there.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import Any, Final

import pytest

from pyforwarder.datapath.ebpf import syscall as bpf
from pyforwarder.datapath.ebpf.arrays import Arrays
from pyforwarder.datapath.express.connection_maps import PROGRAMS, OwnPrograms
from pyforwarder.datapath.proof.apart import load_express_apart
from pyforwarder.datapath.splice.maps import Programs
from pyforwarder.errors import LoadError, Refusal
from pyforwarder.runtime.host import kernel_version
from pyforwarder.runtime.slowness import scaled_s
from pyforwarder.supervisor.files.view_walks import FILES, WALKS, link

OLD: Final = (6, 6)
MOST: Final = 750_000 if kernel_version() < OLD else 220_000
# So that no start of a daemon waits for it: a hundred thousand are a quarter of a second.
MOST_OF_VIEW: Final = MOST / 2


@pytest.fixture
def took(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Instructions that the verifier goes through, by program; filled by loads."""
    found: dict[str, int] = {}
    load = bpf.load_program

    def loaded(*arguments: Any, **more: Any) -> int:
        fd = load(*arguments, **more)
        said = re.search(
            r"^verified_insns:\s*(\d+)$", Path(f"/proc/self/fdinfo/{fd}").read_text(), re.MULTILINE
        )
        assert said is not None
        found[more.get("name", "pf_probe")] = int(said[1])
        return fd

    monkeypatch.setattr(bpf, "load_program", loaded)
    return found


@pytest.mark.timeout(scaled_s(120))
def test_every_program_of_splice_and_express_keeps_away_from_the_limit(
    took: dict[str, int],
) -> None:
    with load_express_apart() as (_, programs):
        for fd in programs:
            os.close(fd)
    assert set(Programs._fields) | set(PROGRAMS) | set(OwnPrograms._fields) <= set(took)
    assert {name: number for name, number in took.items() if number > MOST} == {}


@pytest.mark.timeout(scaled_s(120))
def test_every_program_of_the_view_keeps_away_from_the_limit(took: dict[str, int]) -> None:
    slots = 16_384
    causes: set[Refusal | None] = set()
    with contextlib.ExitStack() as stack:
        arrays = Arrays.create(workers=2, slots=slots)
        stack.callback(arrays.close)
        for walk in WALKS:
            try:
                links = link(arrays, None, [walk], workers=2, slots=slots)
            except LoadError as error:
                causes.add(error.cause)  # many hosts take but one way
                continue
            for fd in links.opened:
                stack.callback(os.close, fd)
    assert Refusal.VERIFIER not in causes
    assert len(took) >= len(FILES)
    assert {name: number for name, number in took.items() if number > MOST_OF_VIEW} == {}
