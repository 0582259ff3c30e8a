"""Compares pyforwarder's datapaths with a direct connection and with other forwarders.

`measures`, `results`, `goals`, `report` and `picture` are pure: they know what is measured, compute
and print. `topology`, `targets`, `load`, `memory` and `scenarios` touch the machine.
"""
