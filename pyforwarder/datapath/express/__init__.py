"""Express: the kernel decides by a connection's first packet, and connects to the server.

A part of splice: such a connection is a spliced pair once it has begun. `tables.py` and `maps.py`
are the rules as the programs have them, `connecting.py` the programs, `places.py` where connections
begin, `keeping.py` the keeper's part, and `sharing.py` what its processes tell each other.
"""
