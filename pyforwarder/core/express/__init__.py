"""Which rules a program in the kernel can decide by a connection's first packet, and how.

Rules are compiled to a table (`compiling.py`) of conditions (`conditions.py`), which is applied to
what a program can read of a packet (`reading.py`). Pure: no sockets, and nothing of BPF.

The table decides as the rules themselves would. Where that is not certain it decides nothing, and
userspace applies the rules to the packet.
"""
