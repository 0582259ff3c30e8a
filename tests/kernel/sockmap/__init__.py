"""The sockmap datapath where it is special."""
