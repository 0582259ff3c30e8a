"""What is said of a program that the kernel does not take: the true cause, in one line."""

from __future__ import annotations

import ctypes
import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from pyforwarder.datapath.ebpf import syscall as bpf
from pyforwarder.datapath.ebpf.loading import ProgramKind, load_programs
from pyforwarder.errors import LoadError, Refusal
from pyforwarder.runtime.slowness import scaled_s
from tests.helpers.capabilities import State, this_host
from tests.helpers.daemon import run_command

if TYPE_CHECKING:
    from tests.helpers.daemon import Place
    from tests.kernel.conftest import StartForwarder

SOURCE: Final = str(Path(__file__).with_name("refused.c"))
BUILTIN: Final = """
listeners:
  - name: main
    bind: 127.0.0.1:0
    rules: [{match: instruction, allow: [loopback]}]
"""


def refusal_of(name: str, kind: ProgramKind, **defines: str | int) -> LoadError:
    with pytest.raises(LoadError) as caught:
        load_programs(SOURCE, [(name, kind)], defines=defines)
    assert "\n" not in str(caught.value)
    assert "run as root" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("kind", ["sk_skb", "sched_cls"])
def test_program_with_a_fault_is_refused_by_the_verifier(kind: ProgramKind) -> None:
    error = refusal_of("reads_beyond_its_context", kind)
    assert error.cause is Refusal.VERIFIER
    assert "the verifier refuses it" in str(error)
    assert "invalid bpf_context access" in error.log
    assert "bpf_context" not in str(error)


def test_source_with_a_fault_is_refused_by_the_compiler() -> None:
    error = refusal_of("returns", "sk_skb", BROKEN=1)
    assert error.cause is Refusal.COMPILER
    assert "this is no C" in error.log
    assert "this is no C" not in str(error)


@pytest.mark.parametrize(
    ("kind", "capability"),
    [("map_iterator", "map iterators"), ("socket_iterator", "socket iterators")],
)
def test_kind_that_a_host_refuses_is_named_with_its_lockdown(
    kind: ProgramKind, capability: str
) -> None:
    here = this_host()
    if here.state(capability) is State.REFUSED:
        error = refusal_of("returns", kind)
        assert error.cause is Refusal.PROGRAM_TYPE
        assert "to everybody" in str(error)
        assert str(error).endswith(f"lockdown is {here.lockdown}")
    else:
        for fd in load_programs(SOURCE, [("returns", kind)], defines={}):
            os.close(fd)


@pytest.mark.parametrize(
    ("lost", "named"),
    [
        ("-sys_admin,-bpf", ["CAP_BPF"]),
        ("-sys_admin,-perfmon", ["CAP_PERFMON"]),
        ("-sys_admin,-net_admin", ["CAP_NET_ADMIN"]),
        ("-sys_admin,-bpf,-perfmon", ["CAP_BPF", "CAP_PERFMON"]),
    ],
)
def test_lack_of_a_capability_is_named_in_one_line_everywhere(
    lost: str, named: list[str], start_forwarder: StartForwarder
) -> None:
    prefix = ["setpriv", "--bounding-set", lost, "--inh-caps=-all", "--no-new-privs"]
    forwarder = start_forwarder(BUILTIN, prefix=prefix)
    (line,) = (line for line in forwarder.output().splitlines() if "no_sockmap" in line)
    said = forwarder.show("stats")["datapaths"]["sockmap"]
    for name in ("CAP_BPF", "CAP_PERFMON", "CAP_NET_ADMIN"):
        assert (name in line, name in said) == (name in named, name in named)
    table = forwarder.command("show", "stats").stdout
    assert "run as root" not in line  # it is
    for text in (forwarder.output(), table):
        assert not re.search(r"\\012|\\n|insns", text)


def test_process_without_capabilities_is_told_what_is_missing(place: Place) -> None:
    # Root's files can be read (the checkout may be his alone), and nothing else is allowed.
    done = subprocess.run(
        [
            *("setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"),
            *(sys.executable, "-m", "pyforwarder", "doctor", "--json"),
        ],
        env=place.environ(),
        capture_output=True,
        text=True,
        timeout=scaled_s(50),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for name in ("sockmap", "splice"):
        found = json.loads(done.stdout)["datapaths"][name]
        assert found["cause"] == "capabilities"
        assert "CAP_BPF and CAP_PERFMON and CAP_NET_ADMIN are missing" in found["reason"]


def test_doctor_names_the_lockdown(place: Place) -> None:
    done = run_command(place, "doctor", "--json", deadline_s=scaled_s(50))
    (lockdown,) = (
        finding for finding in json.loads(done.stdout)["findings"] if finding["name"] == "lockdown"
    )
    assert lockdown["detail"].startswith(f"{this_host().lockdown}: ")


def forbid_bpf() -> None:
    """A seccomp filter, as containers have one, that answers bpf(2) with EPERM."""
    # linux/filter.h, linux/seccomp.h: load the number; if it is bpf, return EPERM; else allow.
    instructions = [
        (0x20, 0, 0, 0),
        (0x15, 0, 1, bpf._number),
        (0x06, 0, 0, 0x00050000 | 1),
        (0x06, 0, 0, 0x7FFF0000),
    ]
    code = ctypes.create_string_buffer(
        b"".join(struct.pack("=HBBI", *instruction) for instruction in instructions)
    )
    program = ctypes.create_string_buffer(
        struct.pack("=HxxxxxxQ", len(instructions), ctypes.addressof(code)), 16
    )
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(22, 2, program, 0, 0):  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
        raise OSError(ctypes.get_errno(), "prctl")


def test_seccomp_filter_is_named(place: Place) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pyforwarder", "doctor", "--json"],
        preexec_fn=forbid_bpf,
        env=place.environ(),
        capture_output=True,
        text=True,
        timeout=scaled_s(50),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for name in ("sockmap", "splice"):
        found = json.loads(done.stdout)["datapaths"][name]
        assert (found["cause"], found["works"]) == ("confined", False)
        assert "seccomp" in found["reason"]
