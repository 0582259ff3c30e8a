"""The cause that is named for a load that the kernel refused, on hosts of several kinds."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable

import pytest

from pyforwarder.datapath.ebpf import probing, refusal
from pyforwarder.datapath.ebpf.refusal import Process, explain
from pyforwarder.errors import LoadError, Refusal
from pyforwarder.runtime.host import Capability, Lockdown

VERIFIER_LOG = "0: (b7) r0 = 0\n1: (95) exit\nprocessed 2 insns (limit 1000000)\n"


def a_process(
    *,
    lacks: Iterable[Capability] = (),
    in_user_namespace: bool = False,
    seccomp: bool = False,
    lockdown: Lockdown = Lockdown.NONE,
    kernel: tuple[int, int] = (6, 12),
    kinds: int | LoadError = 0,
    root: bool = False,
) -> Process:
    """One whose kernel answers `kinds` to the shortest program of any kind."""

    def try_kind(kind: str) -> None:
        assert kind in probing.KINDS
        if isinstance(kinds, LoadError):
            raise kinds
        if kinds:
            raise OSError(kinds, os.strerror(kinds))

    missing: Callable[[Iterable[Capability]], tuple[Capability, ...]] = lambda needed: tuple(  # noqa: E731
        capability for capability in needed if capability in set(lacks)
    )
    return Process(
        missing,
        lambda: in_user_namespace,
        lambda: seccomp,
        lambda: lockdown,
        lambda: kernel,
        try_kind,
        lambda: root,
    )


@pytest.mark.parametrize(
    ("process", "number", "cause", "words"),
    [
        (
            a_process(lacks=[Capability.CAP_PERFMON, Capability.CAP_NET_ADMIN]),
            errno.EPERM,
            Refusal.CAPABILITIES,
            "CAP_PERFMON and CAP_NET_ADMIN are missing",
        ),
        # Without it the verifier knows no helper of tracing, and forbids arithmetic on pointers.
        (a_process(lacks=[Capability.CAP_PERFMON]), errno.EINVAL, Refusal.CAPABILITIES, "PERFMON"),
        (a_process(lacks=[Capability.CAP_PERFMON]), errno.EACCES, Refusal.CAPABILITIES, "PERFMON"),
        (a_process(in_user_namespace=True), errno.EPERM, Refusal.CONFINED, "user namespace"),
        (
            a_process(seccomp=True, kinds=errno.EPERM),
            errno.EPERM,
            Refusal.CONFINED,
            "seccomp",
        ),
        (
            a_process(kinds=errno.EPERM, lockdown=Lockdown.INTEGRITY),
            errno.EPERM,
            Refusal.PROGRAM_TYPE,
            "refuses sk_skb programs to everybody (Operation not permitted, though no capability "
            "is missing); lockdown is integrity",
        ),
        (
            a_process(kinds=errno.EINVAL, kernel=(4, 9)),
            errno.EINVAL,
            Refusal.TOO_OLD,
            "Linux 4.9 does not know sk_skb programs; they came with 4.14",
        ),
        (
            a_process(kinds=LoadError("no BTF", cause=Refusal.TOO_OLD, advice="build it in")),
            errno.EINVAL,
            Refusal.TOO_OLD,
            "no BTF; build it in",
        ),
        (a_process(), errno.EINVAL, Refusal.VERIFIER, "verifier refuses it (Invalid argument)"),
        (a_process(), errno.EACCES, Refusal.VERIFIER, "verifier refuses it (Permission denied)"),
        (a_process(), errno.E2BIG, Refusal.VERIFIER, "verifier"),
        (a_process(), errno.ENOMEM, Refusal.MEMORY, "Cannot allocate memory"),
        (a_process(kinds=errno.ENOMEM), errno.EPERM, Refusal.MEMORY, ""),
        (a_process(), errno.ENOSYS, Refusal.TOO_OLD, "no bpf(2)"),
    ],
)
def test_refused_program_names_its_cause(
    process: Process, number: int, cause: Refusal, words: str
) -> None:
    error = explain("load x() of y.c", number, kind="sk_skb", log=VERIFIER_LOG, process=process)
    assert error.cause is cause
    assert words in str(error)
    assert str(error).startswith("load x() of y.c: ")
    assert "\n" not in str(error)
    assert "insns" not in str(error)
    assert ("run as root" in str(error)) is (cause is Refusal.CAPABILITIES)


@pytest.mark.parametrize(
    ("process", "number", "cause", "words"),
    [
        (
            a_process(lacks=[Capability.CAP_BPF]),
            errno.EPERM,
            Refusal.CAPABILITIES,
            "CAP_BPF is missing; run as root",
        ),
        (a_process(seccomp=True), errno.EPERM, Refusal.CONFINED, "seccomp"),
        (
            a_process(lockdown=Lockdown.CONFIDENTIALITY),
            errno.EPERM,
            Refusal.OTHER,
            "refuses bpf(2), though no capability is missing; lockdown is confidentiality",
        ),
        (a_process(), errno.ENOMEM, Refusal.MEMORY, "Cannot allocate memory"),
        (a_process(), errno.EINVAL, Refusal.OTHER, "Invalid argument"),
    ],
)
def test_refused_map_names_its_cause(
    process: Process, number: int, cause: Refusal, words: str
) -> None:
    error = explain("create the BPF map z", number, process=process)
    assert error.cause is cause
    assert words in str(error)


@pytest.mark.parametrize("kind", probing.KINDS)
def test_every_kind_has_words_and_capabilities(kind: str) -> None:
    error = explain("load", errno.EPERM, kind=kind, process=a_process(kinds=errno.EPERM))
    assert error.cause is Refusal.PROGRAM_TYPE
    assert Capability.CAP_BPF in refusal.needed_by(kind)


def test_root_that_lacks_a_capability_is_not_told_to_be_root() -> None:
    process = a_process(lacks=[Capability.CAP_BPF], root=True)
    error = explain("create the BPF map z", errno.EPERM, process=process)
    assert error.cause is Refusal.CAPABILITIES
    assert "run as root" not in str(error)
    assert "CapabilityBoundingSet" in str(error)
