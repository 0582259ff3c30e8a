"""The pictures in docs/pictures/ that need nothing but what stands in the tree."""

from __future__ import annotations

from documents import measured
from documents.svg import Drawing

_PANEL = 300
_GAP = 20


def pictures() -> dict[str, str]:
    """Their paths below docs/, and what they should be."""
    return {"pictures/datapaths.svg": datapaths(), "pictures/numbers.svg": measured.chart()}


def datapaths() -> str:
    """Who touches the bytes: copy, sockmap and splice side by side."""
    drawing = Drawing(3 * _PANEL + 4 * _GAP, 290)
    for index, (name, words) in enumerate(
        (
            ("copy", "a worker reads and writes every byte"),
            ("sockmap", "the kernel moves bytes from socket to socket"),
            ("splice", "packets get new headers and go on"),
        )
    ):
        left = _GAP + index * (_PANEL + _GAP)
        middle = left + _PANEL // 2
        drawing.text(middle, 22, name, "title")
        drawing.text(middle, 40, words, "middle")
        drawing.box(left, 52, _PANEL, 66, "user", border=True)
        drawing.text(left + 6, 66, "userspace", "small")
        drawing.box(left, 118, _PANEL, 112, "kernel", border=True)
        drawing.text(left + 6, 132, "kernel", "small")
        c, s = left + 65, left + _PANEL - 65
        if name == "copy":
            path = [(c, 248), (c, 130), (middle - 30, 104), (middle + 30, 104), (s, 130), (s, 248)]
        elif name == "sockmap":
            path = [(c, 248), (c, 154), (s, 154), (s, 248)]
        else:
            path = [(c, 248), (c, 204), (s, 204), (s, 248)]
        drawing.arrow(*path)
        for x, whose in ((left + 20, "client"), (left + _PANEL - 110, "server")):
            drawing.box(x, 140, 90, 28, "end", border=True)
            drawing.text(x + 45, 158, f"TCP, {whose}'s", "middle")
            drawing.box(x, 190, 90, 28, "end", border=True)
            drawing.text(x + 45, 208, "interface", "middle")
            drawing.text(x + 45, 262, whose, "title")
        worker = "worker" if name == "copy" else "worker: sleeps"
        drawing.box(middle - 55, 74, 110, 30, "end", border=True)
        drawing.text(middle, 93, worker, "middle")
    drawing.text(
        _GAP, 282, "splice goes past TCP, nftables, iptables and conntrack of this host", "small"
    )
    return drawing.svg()
