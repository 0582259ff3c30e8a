"""Deciding in the kernel: the tables of rules as a program has them.

No datapath yet: what is here is used by tests, which compare the program with the rules.
"""
