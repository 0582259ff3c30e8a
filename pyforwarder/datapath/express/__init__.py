"""Express: the kernel decides by a connection's first packet, and connects to the server.

It is a part of splice: from the server's answer on such a connection is a spliced pair. `tables.py`
and `maps.py` put the rules into maps, `connections.py` loads the programs, `places.py` looks after
the places in which connections begin, `keeping.py` is the keeper's part, and `sharing.py` is the
memory and the sockets between the daemon's processes.
"""
