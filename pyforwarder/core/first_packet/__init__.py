"""What a connection's first bytes are: one protocol per file, no sockets, no clock.

`matcher.py` holds the contract all of them keep, `outcome.py` the words they answer in,
`table.py` the list of them, `cursor.py` what they read with.
"""
