"""What the kernel says of itself and of this process, read from texts as kernels write them."""

from __future__ import annotations

import pytest

from pyforwarder.runtime.host import (
    Capability,
    Lockdown,
    kernel_version,
    lockdown_of,
    missing_capabilities,
)


@pytest.mark.parametrize(
    ("release", "version"),
    [
        ("6.1.0-49-amd64", (6, 1)),
        ("6.12.95+deb12-cloud-amd64", (6, 12)),
        ("7.3-rc1", (7, 3)),
        ("unheard of", (0, 0)),
    ],
)
def test_kernel_version_is_read_from_a_release(release: str, version: tuple[int, int]) -> None:
    assert kernel_version(release) == version


@pytest.mark.parametrize(
    ("said", "mode"),
    [
        ("[none] integrity confidentiality\n", Lockdown.NONE),
        ("none [integrity] confidentiality\n", Lockdown.INTEGRITY),
        ("none integrity [confidentiality]\n", Lockdown.CONFIDENTIALITY),
        ("none [secrecy]\n", Lockdown.UNKNOWN),
        ("", Lockdown.UNKNOWN),
    ],
)
def test_lockdown_is_the_mode_in_brackets(said: str, mode: Lockdown) -> None:
    assert lockdown_of(said) is mode


@pytest.mark.parametrize(
    ("held", "missing"),
    [
        ([], ["CAP_BPF", "CAP_PERFMON", "CAP_NET_ADMIN"]),
        (["CAP_BPF", "CAP_NET_ADMIN"], ["CAP_PERFMON"]),
        (["CAP_SYS_ADMIN"], ["CAP_NET_ADMIN"]),
        (["CAP_SYS_ADMIN", "CAP_NET_ADMIN"], []),
        (["CAP_BPF", "CAP_PERFMON", "CAP_NET_ADMIN"], []),
    ],
)
def test_missing_capabilities_are_named(held: list[str], missing: list[str]) -> None:
    effective = sum(1 << Capability[name] for name in held)
    needed = (Capability.CAP_BPF, Capability.CAP_PERFMON, Capability.CAP_NET_ADMIN)
    found = missing_capabilities(needed, {"CapEff": f"{effective:016x}"})
    assert [capability.name for capability in found] == missing


def test_process_without_a_status_has_nothing() -> None:
    assert missing_capabilities([Capability.CAP_BPF], {}) == (Capability.CAP_BPF,)
