"""Modules have moved into packages, and names into modules: those of version 0.1 still lead there.

The same module is found by both names, so that its types stay one.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Mapping, Sequence
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
    "supervisor.files": (
        "supervisor.bpffs supervisor.pins supervisor.proc supervisor.pseudo_files supervisor.views"
    ),
    "supervisor.processes": (
        "health=health_checker supervisor.checking=health_process supervisor.scraping=web_process"
    ),
    "supervisor.requests": "supervisor.control=control_socket supervisor.report",
    "supervisor.workers": "supervisor.worker_pool=pool",
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
    "datapath.sockmap": "datapath.kernel=maps datapath.send_buffer",
    "datapath.proof": "datapath.selftest datapath.rig datapath.scenarios",
    "worker": "worker.adopting=foreign_sockets",
    "worker.udp": "worker.datagrams=server",
}

# module: where names are that it had; `old=new` where the name has changed, too
_BY_MODULE: Final[Mapping[str, Mapping[str, str]]] = {
    "cli.lifecycle": {"core.datapaths": "DATAPATHS=NAMES"},
    "config.model": {
        "config.fields": "SendProxy TokenUse",
        "config.listener": "FirstPacket ProxyProtocol",
        "config.upstream": "Ejection Health Server",
    },
    "core.routing": {
        "core.explaining": "Explanation RuleReport explain",
        "core.rule_compiling": "ListenerConfig RuleConfig compile_rules",
    },
    "core.upstreams": {
        "core.health": "CheckSchedule Health",
        "core.server_choice": "ROUND_STEPS",
    },
    "datapath.ebpf.abi": {"datapath.ebpf.abi": "End=SocketOwner VerdictDirection=KernelDirection"},
    "datapath.sockmap": {
        "datapath.sockmap.datapath": "SockmapDatapath",
        "runtime.socket_options": "SO_COOKIE",
    },
    "datapath.sockmap.maps": {"datapath.ebpf.pair_table": "PairTable slots_for"},
    "datapath.splice": {
        "datapath.splice.adopted": "Orphan",
        "datapath.splice.datapath": "SpliceDatapath",
    },
    "datapath.splice.keeper": {
        "datapath.splice.keeper_client": "KeeperClient KeeperError",
        "datapath.splice.keeper_process": "KeeperProcess",
        "datapath.splice.pins": "pins_of",
        "datapath.splice.records": "splice_memory",
        "datapath.splice.splicing": "Splicing",
    },
    "datapath.splice.maps": {
        "datapath.splice.interfaces": "LOOPBACK smallest_mtu",
        "datapath.splice.pins": "unpin",
        "datapath.splice.records": (
            "FLOW ID_AT KEY_BYTES SLOT_AT STATE_AT WORKER_AT forget_flows id_of set_state "
            "used_indexes"
        ),
    },
    "datapath.splice.sockets": {"datapath.splice.sockets": "End=SocketEnd"},
    "runtime.resolver": {"runtime.askers": "lookup"},
    "supervisor.configuration": {
        "supervisor.configuration.in_force": "Change ConfigSource InForce=ConfigInForce"
    },
    "supervisor.files": {"supervisor.files.view_and_proc": "Files remove_stale_pins"},
    "supervisor.listeners": {
        "supervisor.listeners.binding": "Listeners TCP4_HEADERS_BYTES TCP6_HEADERS_BYTES"
    },
    "supervisor.processes.health_checker": {
        "supervisor.processes.health_checker": "Verdict=HealthResult"
    },
    "supervisor.requests": {"supervisor.requests.obeying": "Requests"},
    "supervisor.workers": {
        "supervisor.workers.process": (
            "ANSWER_TIMEOUT_S TRANSPARENT WorkerProcess ask_all check_user grant"
        )
    },
    "worker.foreign_sockets": {
        "runtime.socket_options": "cookie_of",
        "worker.foreign_sockets": "adoptable=foreign_socket",
    },
    "worker.generation": {
        "worker.generation": "JOINED=FOREIGN_LISTENER",
        "worker.settings": "Settings with_overrides",
    },
    "worker.log": {"worker.log": "impatient=not_blocking"},
    "worker.process": {"worker.inheritance": "Inheritance"},
    "worker.server": {
        "worker.accepting": "ACCEPT_BATCH ACCEPT_PAUSE_S BUSY_CLIENTS NEVER_OURS OVERLOADED",
        "worker.refusing": "REFUSAL_DISCARD_BYTES REFUSAL_LINGER_S",
    },
    "worker.udp.server": {
        "worker.udp.copying": "BATCH MOST_WAITING",
        "worker.udp.session": "Session",
        "worker.udp.sockets": "Key adopt_datagram_socket=datagram_socket_from_fd",
    },
    "worker.udp.sockets": {
        "worker.udp.sockets": "adopt_datagram_socket=datagram_socket_from_fd",
    },
}


def _moves() -> dict[str, str]:
    found = {}
    for package, words in _BY_PACKAGE.items():
        for word in words.split():
            old, _, new = word.partition("=")
            found[f"pyforwarder.{old}"] = f"pyforwarder.{package}.{new or old.rpartition('.')[2]}"
    return found


MOVES: Final = _moves()  # old name: new name


def _moved_names() -> dict[str, dict[str, tuple[str, str]]]:
    found: dict[str, dict[str, tuple[str, str]]] = {}
    for old_module, places in _BY_MODULE.items():
        names = found[f"pyforwarder.{old_module}"] = {}
        for module, words in places.items():
            for word in words.split():
                old, _, new = word.partition("=")
                names[old] = f"pyforwarder.{module}", new or old
    return found


NAMES: Final = _moved_names()  # module: old name: module and new name


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


class _NamesFinder(importlib.abc.MetaPathFinder):
    """Finds the modules that have lost names, and where those are now."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        spec = importlib.machinery.PathFinder.find_spec(name, path) if name in NAMES else None
        if spec is not None and type(spec.loader) is importlib.machinery.SourceFileLoader:
            spec.loader = _NamesLoader(name, spec.loader.path)
        return spec


class _NamesLoader(importlib.machinery.SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        moved = NAMES[module.__name__]

        def get(name: str) -> object:
            if name not in moved:
                raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
            now, new = moved[name]
            warnings.warn(
                f"{module.__name__}.{name} is {now}.{new} now", DeprecationWarning, stacklevel=2
            )
            return getattr(importlib.import_module(now), new)

        # PEP 562. Not written in the modules: type checkers would believe every name then.
        module.__getattr__ = get  # type: ignore[method-assign]


def install() -> None:
    """From here on `import` knows the old names."""
    sys.meta_path[:0] = [_Finder(), _NamesFinder()]
