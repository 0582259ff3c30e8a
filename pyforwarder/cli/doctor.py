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
from pyforwarder.core.datapaths import DATAPATHS, EXPRESS, SESSIONS
from pyforwarder.core.wording import counted
from pyforwarder.datapath.attach import choice as attaching
from pyforwarder.datapath.attach import clsact as attach_clsact
from pyforwarder.datapath.attach import tcx as attach_tcx
from pyforwarder.datapath.ebpf import btf, probing, refusal
from pyforwarder.runtime import host
from pyforwarder.runtime.host import Lockdown
from pyforwarder.runtime.instance import BPFFS
from pyforwarder.runtime.tables import one_line
from pyforwarder.supervisor.files import bpffs
from pyforwarder.supervisor.files.view_selftest import prove_view
from pyforwarder.supervisor.files.view_walks import walks_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pyforwarder.datapath.proof.selftest import Proof

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


def run(stats: Mapping[str, Any] | None) -> Report:
    """Look at everything; takes some seconds, and leaves nothing behind.

    `stats` are those of the running instance; None: there is none.
    """
    user = _WORKER_USER if os.geteuid() == 0 else None
    return Report(
        findings=tuple(_findings(stats)),
        # Last those that `auto` does not take for TCP.
        proofs={
            row.name: pkgutil.resolve_name(row.proof)(user)
            for row in (*DATAPATHS, *SESSIONS, *EXPRESS)
        },
    )


def _findings(stats: Mapping[str, Any] | None) -> list[Finding]:
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
        _kernel_memory(missing),
        _view(),
        _attach(),
        Finding(
            "BTF",
            btf.VMLINUX.exists(),
            str(btf.VMLINUX) if btf.VMLINUX.exists() else "no BTF: CONFIG_DEBUG_INFO_BTF is off",
        ),
        _bpffs(),
        Finding(
            "descriptors",
            most >= 20_000,
            f"{files} (up to {most}): {counted(max(0, most - 64) // 2, 'pair')} per worker",
        ),
        _express_ports(stats, most),
        Finding("unprivileged bpf", None, f"kernel.unprivileged_bpf_disabled={unprivileged}"),
        Finding("processors", None, f"{os.cpu_count()} (one worker for each)"),
    ]


def _express_ports(stats: Mapping[str, Any] | None, files: int) -> Finding:
    """How many connections the kernel opens at once, and how many that were at most."""
    if stats is None:
        detail = f"no instance runs; the limit on open files lets it have up to {files // 2}"
        return Finding("express ports", None, detail)
    found = stats.get("express", {})
    ports, used, most = (found.get(name, 0) for name in ("ports", "ports_used", "ports_most"))
    if not ports:
        return Finding("express ports", None, "the running instance keeps none")
    detail = f"the running instance keeps {ports}: {used} used now, {most} at most"
    none_left = stats.get("express_left", {}).get("no_port", 0)
    if none_left:
        detail += f"; {counted(none_left, 'time')} none was left, raise `express.ports`"
    return Finding("express ports", not none_left, detail)


def _missing(missing: tuple[host.Capability, ...]) -> str:
    if not missing:
        return "with every capability that the datapaths of the kernel need"
    return f"without {', '.join(c.name for c in missing)}: not every datapath works"


_LOCKDOWN: Final = {
    Lockdown.NONE: "nothing is refused for it",
    Lockdown.INTEGRITY: "as with Secure Boot; the datapaths do not need what it forbids",
    Lockdown.CONFIDENTIALITY: "programs may not read kernel memory",
    Lockdown.UNKNOWN: "only root can ask; a program that is refused names its cause",
}


def _lockdown() -> Finding:
    mode = host.lockdown()
    return Finding("lockdown", None, f"{mode}: {_LOCKDOWN[mode]}")


def _kernel_memory(missing: tuple[host.Capability, ...]) -> Finding:
    """Whether splice, its UDP sessions and express look at where a guest's checksums go."""
    if probing.reads_kernel():
        detail = "programs that see packets may read it"
    elif missing:
        detail = f"not known: {', '.join(c.name for c in missing)} would be needed"
    else:
        detail = (
            "programs that see packets may not read it: splice and express go without one check of"
            " packets of this host's guests (docs/security.md)"
        )
    return Finding("kernel memory", None, detail)


def _view() -> Finding:
    proof = prove_view(walks_of(os.environ))
    return Finding("view", proof.walk is not None, proof.detail)


def _bpffs() -> Finding:
    """Whether there is a BPF file system where instances keep their pins."""
    root = Path(os.environ.get("PYFORWARDER_BPFFS") or BPFFS)
    try:
        point, is_mounted = bpffs.point_of(root)
    except OSError as error:
        return Finding("bpffs", None, f"not known: {error.strerror}")
    if is_mounted:
        return Finding(
            "bpffs",
            True,
            f"a BPF file system is mounted at {point}: if the daemon is killed, spliced pairs and"
            f" the files that the kernel prints stay in {root}",
        )
    return Finding(
        "bpffs",
        None,  # no fault
        f"no BPF file system is mounted at {point}; nothing is to be done: `up` by root mounts one,"
        f" so that spliced pairs stay in {root} if the daemon is killed",
    )


_ATTACH: Final = {
    "tcx": "this kernel lets the programs of splice and express see packets at interfaces beside"
    " the programs of others, and takes them away when the instance ends; nothing is to be done",
    "clsact": "the programs of splice and express are filters of `tc` at priority 1 of interfaces,"
    " ahead of those of others; `down` removes them, an empty clsact qdisc stays",
}
_NOT_SPLICED: Final = (
    "pairs that go by such an interface are not spliced; remove that qdisc or filter if they shall"
)


def _attach() -> Finding:
    """How splice comes to the interfaces, and on which it cannot."""
    try:
        kind = attaching.kind()
        why = "" if kind == "tcx" or attach_tcx.is_supported() else "no tcx before Linux 6.6; "
        obstacles = attach_clsact.obstacles() if kind == "clsact" else []
        if obstacles:
            obstacles.append(_NOT_SPLICED)
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
