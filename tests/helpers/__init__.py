"""What the tests share: a forwarder to start, peers to talk to, traffic to compare.

Nothing here imports the product: these helpers see it only through its command line, its sockets
and its files, so that a test which uses them judges the contract and not the implementation.
"""
