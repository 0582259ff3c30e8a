"""The only file that imports bcc: compiles one C file and says what came of it.

Runs as a short-lived process of its own (`python -m pyforwarder.datapath.ebpf._bcc`), because bcc
brings 100 MB of compiler with it and prints its diagnostics straight to file descriptor 2. It
reads one JSON request from standard input, answers with one JSON object on standard output, and
exits. It loads nothing: loading.py, its other end, does.
"""

from __future__ import annotations

import base64
import ctypes
import json
import os
import sys


def main() -> None:
    """Serve one request; exit 0 if an answer was written, also one that says no."""
    answer_fd = os.dup(1)
    # What bcc prints, to either stream, is not the answer.
    os.dup2(2, 1)
    request = json.load(sys.stdin)
    answer = _compiled(request)
    with os.fdopen(answer_fd, "w") as output:
        json.dump(answer, output)


def _compiled(request: dict[str, object]) -> dict[str, object]:
    os.environ["BCC_KERNEL_SOURCE"] = str(request["kernel_source"])
    try:
        import bcc  # type: ignore[import-untyped,import-not-found,unused-ignore]
    except (ImportError, OSError) as error:  # OSError: the module without its libbcc.so
        return _failed("missing", str(error))
    if not hasattr(bcc, "BPF"):
        # PyPI's package of this name is a different project.
        return _failed("foreign", getattr(bcc, "__file__", "?"))
    # bcc raises bare Exception; what went wrong is on standard error, which the parent reads.
    try:
        module = bcc.BPF(src_file=request["source"], cflags=request["cflags"]).module
    except Exception as error:
        return _failed("compile", str(error))
    programs = {}
    functions = request["functions"]
    assert isinstance(functions, list)
    for name in functions:
        start = bcc.lib.bpf_function_start(module, name.encode())
        if not start:
            return _failed("compile", f"there is no function {name}() in it")
        size = bcc.lib.bpf_function_size(module, name.encode())
        programs[name] = base64.b64encode(ctypes.string_at(start, size)).decode()
    licence = bcc.lib.bpf_module_license(module) or b"GPL"
    return {"ok": True, "licence": licence.decode(), "programs": programs}


def _failed(step: str, reason: str) -> dict[str, object]:
    return {"ok": False, "step": step, "reason": reason}


if __name__ == "__main__":
    main()
