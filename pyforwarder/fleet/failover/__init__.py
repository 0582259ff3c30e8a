"""Spliced pairs that other machines of a fleet know of, and go on with when one of them is gone."""
