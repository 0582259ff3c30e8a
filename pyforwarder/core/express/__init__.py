"""Which rules a program in the kernel could decide by a connection's first packet, and how.

Rules are compiled to a table (`compiling.py`) of conditions (`conditions.py`), which is applied to
what a program can read of a packet (`reading.py`). Pure: no sockets, and nothing of BPF.

What the table decides is what the rules themselves would have decided. Whenever that is not
certain, it decides nothing, and the packet is for the rules.
"""
