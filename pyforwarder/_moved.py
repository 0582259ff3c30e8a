"""Modules have moved into packages: the names of version 0.1 still lead to them.

The same module is found by both names, so that its types stay one.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Final

# package: old names; `old=new` where the last part has changed, too
_BY_PACKAGE: Final = {
    "core": (
        "address connection reasons routing policy upstreams token proxy_protocol eyeballs "
        "first_packet"
    ),
    "runtime": (
        "refusals counters limits loop children descriptors environment slowness tables host "
        "host_memory instance worker.channel worker.resolver worker.askers worker.seccomp "
        "worker.linger supervisor.inotify supervisor.pidfd"
    ),
    "config": "key_files",
    "status": "metrics metrics_server=server",
    "supervisor": "health",
    "cli": "rates manual demo doctor",
    "datapath.ebpf": (
        "datapath.bpf=syscall datapath.btf datapath.loading datapath.ringbuf "
        "datapath.table=pair_table datapath.abi datapath.arrays datapath.probing "
        "datapath.refusal"
    ),
    "datapath.splice": (
        "datapath.splice_abi=abi datapath.splice_keeper=keeper datapath.keeper_requests "
        "datapath.splice_maps=maps datapath.splice_sockets=sockets"
    ),
    "datapath.attach": (
        "datapath.attachment=base datapath.attaching=choice datapath.attach_tcx=tcx "
        "datapath.attach_clsact=clsact datapath.traffic_control datapath.unix_names"
    ),
    "datapath.proof": "datapath.selftest datapath.rig datapath.scenarios",
}


def _moves() -> dict[str, str]:
    found = {}
    for package, words in _BY_PACKAGE.items():
        for word in words.split():
            old, _, new = word.partition("=")
            found[f"pyforwarder.{old}"] = f"pyforwarder.{package}.{new or old.rpartition('.')[2]}"
    return found


MOVES: Final = _moves()  # old name: new name


def new_name(name: str) -> str | None:
    """Where a module of that name is now, also one in a package that moved; None if it did not."""
    head, rest = name, ""
    while head:
        if head in MOVES:
            return MOVES[head] + rest
        head, dot, last = head.rpartition(".")
        rest = f"{dot}{last}{rest}"
    return None


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Asked first, or modules of a package that moved would be found and made a second time."""

    def __init__(self) -> None:
        self._specs: dict[str, importlib.machinery.ModuleSpec | None] = {}

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not name.startswith("pyforwarder.") or new_name(name) is None:
            return None
        return importlib.machinery.ModuleSpec(name, self)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        new = new_name(spec.name)
        assert new is not None
        warnings.warn(f"{spec.name} is {new} now", DeprecationWarning, stacklevel=2)
        module = importlib.import_module(new)
        self._specs[spec.name] = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """It has run; the importer has only changed where it says that it comes from."""
        assert module.__spec__ is not None
        module.__spec__ = self._specs.pop(module.__spec__.name)


def install() -> None:
    """From here on `import` knows the old names."""
    sys.meta_path.insert(0, _Finder())
