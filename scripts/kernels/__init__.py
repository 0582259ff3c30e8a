"""Boots Debian's own kernels in qemu, without KVM, and runs tests of this checkout inside.

`guests`, `doctor` and `report` are pure: which kernels, what each must be able to do, what came of
a run. `images` builds what is booted, `machine` boots it. `guest/` is what runs inside.
"""
