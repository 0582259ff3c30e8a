"""The splice datapath: tc programs translate the packets of two connections into each other."""
