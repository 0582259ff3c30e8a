"""What this host can do: facts about the kernel, and each datapath proven by moving real bytes."""

from __future__ import annotations

import os
import pkgutil
import platform
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pyforwarder import __version__
from pyforwarder.core.datapaths import DATAPATHS, OPENING, SESSIONS
from pyforwarder.datapath.attach import choice as attaching
from pyforwarder.datapath.attach import clsact as attach_clsact
from pyforwarder.datapath.attach import tcx as attach_tcx
from pyforwarder.datapath.ebpf import btf, refusal
from pyforwarder.runtime import host
from pyforwarder.runtime.host import Lockdown
from pyforwarder.runtime.tables import one_line
from pyforwarder.supervisor.view_selftest import prove_view
from pyforwarder.supervisor.view_ways import ways_of

if TYPE_CHECKING:
    from pyforwarder.datapath.proof.selftest import Proof

_BPFFS: Final = Path("/sys/fs/bpf")
_WORKER_USER: Final = "nobody"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    name: str
    good: bool | None  # None: only a fact
    detail: str


@dataclass(frozen=True, slots=True)
class Report:
    """All findings, and the datapaths in the order in which `auto` prefers them."""

    findings: tuple[Finding, ...]
    proofs: dict[str, Proof]

    @property
    def is_usable(self) -> bool:
        """Whether at least one datapath works."""
        return any(proof.passed for proof in self.proofs.values())

    @property
    def best(self) -> str | None:
        """The best that works here, which `auto` takes for every pair that it can have."""
        return next((name for name, proof in self.proofs.items() if proof.passed), None)

    def as_json(self) -> dict[str, Any]:
        """The report for programs."""
        return {
            "version": __version__,
            "findings": [
                {"name": f.name, "good": f.good, "detail": f.detail} for f in self.findings
            ],
            "datapaths": {
                name: {
                    "works": proof.passed,
                    "reason": proof.reason,
                    "cause": proof.cause,
                    "seconds": proof.took_s,
                    "scenarios": proof.scenarios,
                }
                for name, proof in self.proofs.items()
            },
            "auto": self.best,
        }

    def logs(self) -> str:
        """What the compiler and the verifier said, whole, under the name of the datapath."""
        return "".join(
            f"--- datapath {name}\n{proof.log.rstrip()}\n"
            for name, proof in self.proofs.items()
            if proof.log
        )

    def as_text(self) -> str:
        """The report for people."""
        mark = {True: "ok ", False: "BAD", None: "   "}
        width = max(len(f.name) for f in self.findings)
        lines = [f"{mark[f.good]} {f.name:<{width}}  {one_line(f.detail)}" for f in self.findings]
        lines.append("")
        for name, proof in self.proofs.items():
            if proof.passed:
                done = f"{len(proof.scenarios)} scenarios in {proof.took_s:.2f} s"
                lines.append(f"ok  datapath {name:<8} moved real bytes: {done}")
            else:
                lines.append(f"BAD datapath {name:<8} {one_line(proof.reason)}")
        lines.append("")
        best = self.best
        lines.append(f"`auto` takes {best} here" if best else "no datapath works here")
        return "\n".join(lines) + "\n"


def run() -> Report:
    """Look at everything; takes some seconds, and leaves nothing behind."""
    user = _WORKER_USER if os.geteuid() == 0 else None
    return Report(
        findings=tuple(_findings()),
        # Last those that `auto` does not take for TCP.
        proofs={
            row.name: pkgutil.resolve_name(row.proof)(user)
            for row in (*DATAPATHS, *SESSIONS, *OPENING)
        },
    )


def _findings() -> list[Finding]:
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    who = "root" if os.geteuid() == 0 else f"user {os.geteuid()}"
    missing = host.missing_capabilities(refusal.NETWORK)
    unprivileged = _read(Path("/proc/sys/kernel/unprivileged_bpf_disabled"))
    return [
        Finding("kernel", None, f"{platform.release()} {platform.machine()}"),
        Finding(
            "privilege",
            not missing,
            f"{who}, {_missing(missing)}",
        ),
        _lockdown(),
        _view(),
        _attach(),
        Finding(
            "BTF",
            btf.VMLINUX.exists(),
            str(btf.VMLINUX) if btf.VMLINUX.exists() else "no BTF: CONFIG_DEBUG_INFO_BTF is off",
        ),
        Finding(
            "bpffs",
            True if os.path.ismount(_BPFFS) else None,  # no fault: nothing is to be done
            f"mounted at {_BPFFS}" if os.path.ismount(_BPFFS) else "not mounted: `up` mounts it",
        ),
        Finding(
            "descriptors",
            most >= 20_000,
            f"{files} (up to {most}): {max(0, most - 64) // 2} pairs per worker",
        ),
        Finding("unprivileged bpf", None, f"kernel.unprivileged_bpf_disabled={unprivileged}"),
        Finding("processors", None, f"{os.cpu_count()} (one worker for each)"),
    ]


def _missing(missing: tuple[host.Capability, ...]) -> str:
    if not missing:
        return "with every capability that the datapaths of the kernel need"
    return f"without {', '.join(c.name for c in missing)}: not every datapath works"


_LOCKDOWN: Final = {
    Lockdown.NONE: "nothing is refused for it",
    Lockdown.INTEGRITY: "as with Secure Boot; the datapaths do not need what it forbids",
    Lockdown.CONFIDENTIALITY: "programs may not read kernel memory; the datapaths do not",
    Lockdown.UNKNOWN: "only root can ask; a program that is refused names its cause",
}


def _lockdown() -> Finding:
    mode = host.lockdown()
    return Finding("lockdown", None, f"{mode}: {_LOCKDOWN[mode]}")


def _view() -> Finding:
    proof = prove_view(ways_of(os.environ))
    return Finding("view", proof.way is not None, proof.detail)


_ATTACH: Final = {
    "tcx": "programs on interfaces are links, which end with us",
    "clsact": "filters at priority 1, ahead of others', which `down` removes; the qdisc stays",
}


def _attach() -> Finding:
    """How splice comes to the interfaces, and on which it cannot."""
    try:
        kind = attaching.kind()
        why = "" if kind == "tcx" or attach_tcx.is_supported() else "no tcx before Linux 6.6; "
        obstacles = attach_clsact.obstacles() if kind == "clsact" else []
    except OSError as error:
        return Finding("attach", None, f"not known: {error.strerror}")
    return Finding(
        "attach",
        False if obstacles else None,
        "; ".join([f"{kind}: {why}{_ATTACH[kind]}", *obstacles]),
    )


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError as error:
        return error.strerror or "unreadable"
