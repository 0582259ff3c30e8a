"""The splice datapath where it is special."""
