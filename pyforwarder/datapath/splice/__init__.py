"""The datapath splice: tc programs translate the packets of two connections into each other."""
