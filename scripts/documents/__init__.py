"""Makes the parts of README.md and docs/ that the program itself knows best.

`scripts/documents/run` writes them, `scripts/documents/run --check` only says what is out of date.
A part stands between two lines, `<!-- made: NAME ARGUMENT -->` and `<!-- /made -->`; `parts.py` is
the table of the names.
"""
