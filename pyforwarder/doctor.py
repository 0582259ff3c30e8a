"""What this host can do: facts about the kernel, and each datapath proven by moving real bytes."""

from __future__ import annotations

import mmap
import os
import platform
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pyforwarder import __version__
from pyforwarder.datapath import bpf, btf
from pyforwarder.datapath.abi import PAIR_BYTES
from pyforwarder.datapath.kernel import KernelMaps
from pyforwarder.datapath.rig import Rig, RigError
from pyforwarder.datapath.scenarios import SELF_TEST
from pyforwarder.datapath.selftest import Proof, prove_sockmap, prove_splice
from pyforwarder.datapath.splice_keeper import Splicing
from pyforwarder.datapath.splice_maps import SpliceMaps
from pyforwarder.datapath.table import PairWindow
from pyforwarder.errors import LoadError

_SLOTS: Final = 64
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
                    "seconds": proof.took_s,
                    "scenarios": proof.scenarios,
                }
                for name, proof in self.proofs.items()
            },
            "auto": self.best,
        }

    def as_text(self) -> str:
        """The report for people."""
        mark = {True: "ok ", False: "BAD", None: "   "}
        width = max(len(f.name) for f in self.findings)
        lines = [f"{mark[f.good]} {f.name:<{width}}  {f.detail}" for f in self.findings]
        lines.append("")
        for name, proof in self.proofs.items():
            if proof.passed:
                done = f"{len(proof.scenarios)} scenarios in {proof.took_s:.2f} s"
                lines.append(f"ok  datapath {name:<8} moved real bytes: {done}")
            else:
                lines.append(f"BAD datapath {name:<8} {proof.reason}")
        lines.append("")
        best = self.best
        lines.append(f"`auto` takes {best} here" if best else "no datapath works here")
        return "\n".join(lines) + "\n"


def run() -> Report:
    """Look at everything; takes some seconds, and leaves nothing behind."""
    return Report(
        findings=tuple(_findings()),
        proofs={"splice": _prove_splice(), "sockmap": _prove_sockmap(), "copy": _prove_copy()},
    )


def _findings() -> list[Finding]:
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    root = os.geteuid() == 0
    unprivileged = _read(Path("/proc/sys/kernel/unprivileged_bpf_disabled"))
    return [
        Finding("kernel", None, f"{platform.release()} {platform.machine()}"),
        Finding(
            "privilege",
            root,
            "root" if root else f"user {os.geteuid()}: only copy works without CAP_BPF",
        ),
        Finding(
            "BTF",
            btf.VMLINUX.exists(),
            str(btf.VMLINUX) if btf.VMLINUX.exists() else "no BTF: CONFIG_DEBUG_INFO_BTF is off",
        ),
        Finding(
            "bpffs",
            _BPFFS.is_mount(),
            f"mounted at {_BPFFS}" if _BPFFS.is_mount() else "not mounted: `up` mounts it",
        ),
        Finding(
            "descriptors",
            most >= 20_000,
            f"{files} (up to {most}): {max(0, most - 64) // 2} pairs per worker",
        ),
        Finding("unprivileged bpf", None, f"kernel.unprivileged_bpf_disabled={unprivileged}"),
        Finding("processors", None, f"{os.cpu_count()} (one worker for each)"),
    ]


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError as error:
        return error.strerror or "unreadable"


def _prove_sockmap() -> Proof:
    started_s = time.monotonic()
    try:
        maps = KernelMaps.load(workers=1, slots=_SLOTS)
    except LoadError as error:
        return Proof(False, str(error), {}, round(time.monotonic() - started_s, 3))
    try:
        return prove_sockmap(maps, slots=_SLOTS, user=_WORKER_USER if os.geteuid() == 0 else None)
    finally:
        maps.close()


def _prove_splice() -> Proof:
    started_s = time.monotonic()
    try:
        pairs_fd = bpf.create_map(
            bpf.MapType.ARRAY,
            key_bytes=4,
            value_bytes=PAIR_BYTES,
            entries=_SLOTS,
            flags=bpf.F_MMAPABLE,
        )
    except OSError as error:
        return Proof(False, f"create a BPF map: {error.strerror}", {}, 0.0)
    try:
        splicing = Splicing(SpliceMaps.load(workers=1, slots=_SLOTS, pairs_fd=pairs_fd), workers=1)
    except LoadError as error:
        os.close(pairs_fd)
        return Proof(False, str(error), {}, round(time.monotonic() - started_s, 3))
    try:
        user = _WORKER_USER if os.geteuid() == 0 else None
        return prove_splice(splicing, pairs_fd=pairs_fd, slots=_SLOTS, user=user)
    finally:
        splicing.close()
        os.close(pairs_fd)


def _prove_copy() -> Proof:
    """The same scenarios, in this process: nothing here can harm it."""
    started_s = time.monotonic()
    passed: dict[str, float] = {}
    for name, scenario in SELF_TEST.items():
        before_s = time.monotonic()
        memory = mmap.mmap(-1, _SLOTS * PAIR_BYTES)
        rig = Rig(PairWindow(memory, first_slot=0, worker_index=0))
        try:
            scenario(rig)
        except (RigError, OSError) as error:
            took_s = round(time.monotonic() - started_s, 3)
            return Proof(False, f"{name}: {error}", passed, took_s)
        finally:
            rig.close()
            rig.window.close()
        passed[name] = round(time.monotonic() - before_s, 3)
    return Proof(True, "", passed, round(time.monotonic() - started_s, 3))
