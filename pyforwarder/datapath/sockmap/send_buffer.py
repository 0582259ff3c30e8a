"""A send queue larger than the system's limit, for the case in directions.py."""

from __future__ import annotations

import socket
import struct
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import _socket

# A queue's bytes are charged with their packets' overhead (sk_buff truesize): at worst, for small
# segments, several times their length.
_OVERHEAD: Final = 4
# Together with what TCP's own autotuning allows (tcp_wmem, 4 MiB) this is the most that a peer who
# never reads can make the kernel hold for one socket.
MOST_BYTES: Final = 16 << 20
_SO_SNDBUFFORCE: Final = 32  # asm-generic/socket.h; Python has no name for it
_SO_MEMINFO: Final = 55
_MEMINFO: Final = struct.Struct("=9I")  # linux/sock_diag.h, SK_MEMINFO_...
_WMEM_QUEUED: Final = 5


def enlarge_send_buffer(sock: _socket.socket, by_bytes: int) -> None:
    """Make room for `by_bytes` more, up to MOST_BYTES in all.

    Raises:
        PermissionError: without CAP_NET_ADMIN.
    """
    # The kernel doubles what is set, and reports the doubled value (socket(7)). The queue may hold
    # more than its limit: one write may exceed it, and memory pressure lowers it.
    size = sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
    memory = sock.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, _MEMINFO.size)
    queued = _MEMINFO.unpack(memory)[_WMEM_QUEUED]
    wanted = min(MOST_BYTES, max(size, queued) + _OVERHEAD * by_bytes + (1 << 18))
    if wanted > size:
        sock.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, wanted // 2)
