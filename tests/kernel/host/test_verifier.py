"""How much our programs take of what the verifier allows.

It goes through a million instructions at most (BPF_COMPLEXITY_LIMIT_INSNS, linux/bpf.h). Older
kernels see fewer of the states of a program as equal: of `ingress` 6.1 goes through three times as
many instructions as 6.18, and has refused what took 293,000 there.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Final

import pytest

from pyforwarder.datapath.ebpf import syscall as bpf
from pyforwarder.datapath.express.connecting import PROGRAMS, OwnPrograms
from pyforwarder.datapath.proof.apart import load_express_apart
from pyforwarder.datapath.splice.maps import Programs
from pyforwarder.runtime.host import kernel_version
from pyforwarder.runtime.slowness import scaled_s

OLD: Final = (6, 6)
MOST: Final = 750_000 if kernel_version() < OLD else 220_000
# Nearly all of it are rounds of one loop, of which 6.1 goes through half as many.
MOST_OF_LOOPS: Final = {"by_rules": 500_000}


@pytest.mark.timeout(scaled_s(120))
def test_every_program_of_splice_and_express_keeps_away_from_the_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    took: dict[str, int] = {}
    load = bpf.load_program

    def loaded(*arguments: Any, **more: Any) -> int:
        fd = load(*arguments, **more)
        said = re.search(
            r"^verified_insns:\s*(\d+)$", Path(f"/proc/self/fdinfo/{fd}").read_text(), re.MULTILINE
        )
        assert said is not None
        took[more.get("name", "pf_probe")] = int(said[1])
        return fd

    monkeypatch.setattr(bpf, "load_program", loaded)
    with load_express_apart() as (_, programs):
        for fd in programs:
            os.close(fd)
    assert set(Programs._fields) | set(PROGRAMS) | set(OwnPrograms._fields) <= set(took)
    too_much = {
        name: number for name, number in took.items() if number > MOST_OF_LOOPS.get(name, MOST)
    }
    assert too_much == {}
