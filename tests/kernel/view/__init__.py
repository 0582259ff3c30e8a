"""The files that BPF serves: `show`, `stats` and the rest."""
