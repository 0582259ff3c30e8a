"""The only file that imports bcc: compiles one C file and hands back its programs.

Runs as a short-lived process of its own (`python -m pyforwarder.datapath._bcc FD`), because bcc
brings 100 MB of compiler with it and prints its diagnostics straight to file descriptor 2. It
reads one JSON request from standard input, answers with one JSON line on the socket FD, program
descriptors attached in the order of the request, and exits. loading.py is its other end.
"""

from __future__ import annotations

import json
import os
import socket
import sys


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
        kinds = {
            "sk_skb": bcc.BPF.SK_SKB,
            "sched_cls": bcc.BPF.SCHED_CLS,
            "iterator": bcc.BPF.TRACING,
        }
        programs = [module.load_func(name, kinds[kind]).fd for name, kind in request["programs"]]
    # bcc raises bare Exception; what went wrong is on standard error, which the parent reads.
    except Exception as error:
        _fail(channel, "load", str(error))
        return
    socket.send_fds(channel, [json.dumps({"ok": True}).encode()], programs)


def _fail(channel: socket.socket, kind: str, reason: str) -> None:
    channel.sendall(json.dumps({"ok": False, "kind": kind, "reason": reason}).encode())


if __name__ == "__main__":
    main()
