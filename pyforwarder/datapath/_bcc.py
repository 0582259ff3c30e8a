"""The only file that imports bcc: compiles one C file and hands back its programs.

Runs as a short-lived process of its own (`python -m pyforwarder.datapath._bcc FD`), because bcc
brings 100 MB of compiler with it and prints its diagnostics straight to file descriptor 2. It
reads one JSON request from standard input, answers with one JSON line on the socket FD, program
descriptors attached in the order of the request, and exits. loading.py is its other end.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import sys
from typing import Any


def main() -> None:
    """Serve one request; exit 0 if an answer was sent, whatever it says."""
    channel = socket.socket(fileno=int(sys.argv[1]))
    request = json.load(sys.stdin)
    os.environ["BCC_KERNEL_SOURCE"] = request["kernel_source"]
    try:
        import bcc  # type: ignore[import-untyped,import-not-found,unused-ignore]
    except ImportError as error:
        _fail(channel, "missing", str(error))
        return
    if not hasattr(bcc, "BPF"):
        # PyPI's package of this name is a different project.
        _fail(channel, "foreign", getattr(bcc, "__file__", "?"))
        return
    try:
        module = bcc.BPF(src_file=request["source"], cflags=request["cflags"])
        programs = [_load(bcc, module, name, kind) for name, kind in request["programs"]]
    # bcc raises bare Exception; what went wrong is on standard error, which the parent reads.
    except Exception as error:
        _fail(channel, "load", str(error))
        return
    socket.send_fds(channel, [json.dumps({"ok": True}).encode()], programs)


def _load(bcc: Any, module: Any, name: str, kind: str) -> int:
    """One function's descriptor; what the verifier says goes to standard error."""
    kinds = {"sk_skb": bcc.BPF.SK_SKB, "sched_cls": bcc.BPF.SCHED_CLS}
    if kind in kinds:
        fd: int = module.load_func(name, kinds[kind]).fd
        return fd
    # An iterator finds its target by the name it is loaded under. load_func() takes that for the
    # function's name too, and then there could be only one iterator of a kind in a file.
    target = {"map_iterator": b"bpf_iter__bpf_map_elem", "socket_iterator": b"bpf_iter__sockmap"}
    lib, function = bcc.lib, name.encode()
    fd = lib.bcc_func_load(
        module.module,
        bcc.BPF.TRACING,
        target[kind],
        lib.bpf_function_start(module.module, function),
        lib.bpf_function_size(module.module, function),
        lib.bpf_module_license(module.module),
        lib.bpf_module_kern_version(module.module),
        0,
        None,
        0,
        None,
        -1,
    )
    if fd < 0:
        raise OSError(f"Failed to load BPF program {name}: {os.strerror(ctypes.get_errno())}")
    return fd


def _fail(channel: socket.socket, kind: str, reason: str) -> None:
    channel.sendall(json.dumps({"ok": False, "kind": kind, "reason": reason}).encode())


if __name__ == "__main__":
    main()
