"""A worker: one process, one loop, its share of the connections. Needs no privilege."""
