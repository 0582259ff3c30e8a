"""The records of a listener's table of rules, as the program reads them.

Data only: bpf/express.h declares them. A test compiles that and compares every offset.
"""

from __future__ import annotations

import ctypes
from typing import Final

from pyforwarder.core.express.compiling import MOST_PREFIX_BYTES, MOST_PREFIXES
from pyforwarder.core.express.reading import MOST_METHOD_BYTES, MOST_NAME_BYTES
from pyforwarder.core.express.request_grammar import MOST_CLASSES, MOST_STATES
from pyforwarder.core.express.table import MOST_CLAUSES, MOST_METHODS

VERSION: Final = 1
WORDS: Final = MOST_PREFIX_BYTES // 8
# Where a name was read.
IN_HELLO, IN_REQUEST, IN_ALPN = 1, 2, 3


class Grammar(ctypes.Structure):
    """struct express_grammar."""

    _fields_ = (
        ("class_", ctypes.c_ubyte * 256),
        ("following", ctypes.c_ubyte * (MOST_STATES * MOST_CLASSES)),
    )


class Prefix(ctypes.Structure):
    """struct express_prefix."""

    _fields_ = (
        ("bit", ctypes.c_uint64),
        ("value", ctypes.c_ubyte * MOST_PREFIX_BYTES),
        ("mask", ctypes.c_ubyte * MOST_PREFIX_BYTES),
        ("end", ctypes.c_uint32),
        ("padding", ctypes.c_uint32),
    )


class Clause(ctypes.Structure):
    """struct express_clause."""

    _fields_ = (
        ("holds", ctypes.c_uint64),
        ("fails", ctypes.c_uint64),
        ("rule", ctypes.c_uint32),
        ("padding", ctypes.c_uint32),
    )


class Method(ctypes.Structure):
    """struct express_method."""

    _fields_ = (
        ("bits", ctypes.c_uint64),
        ("bytes", ctypes.c_uint32),
        ("text", ctypes.c_ubyte * MOST_METHOD_BYTES),
        ("padding", ctypes.c_uint32),
    )


class Table(ctypes.Structure):
    """struct express_table."""

    _fields_ = (
        ("targets", ctypes.c_uint64),
        ("hello", ctypes.c_uint64),
        ("server_names", ctypes.c_uint64),
        ("alpn", ctypes.c_uint64),
        ("hosts", ctypes.c_uint64),
        ("networks", ctypes.c_uint64),
        ("prefixes", ctypes.c_uint64),
        ("requests", ctypes.c_uint64),
        ("any_method", ctypes.c_uint64),
        ("most_bytes", ctypes.c_uint32),
        ("clause_count", ctypes.c_uint32),
        ("prefix_count", ctypes.c_uint32),
        ("method_count", ctypes.c_uint32),
        ("method", Method * MOST_METHODS),
        ("clause", Clause * MOST_CLAUSES),
        ("prefix", Prefix * MOST_PREFIXES),
    )


class NameKey(ctypes.Structure):
    """struct express_name_key."""

    _fields_ = (
        ("prefix_bits", ctypes.c_uint32),
        ("table", ctypes.c_uint32),
        ("kind", ctypes.c_ubyte),
        ("name", ctypes.c_ubyte * (MOST_NAME_BYTES + 1)),
        ("padding", ctypes.c_ubyte * 2),
    )


class NetworkKey(ctypes.Structure):
    """struct express_network_key."""

    _fields_ = (
        ("prefix_bits", ctypes.c_uint32),
        ("table", ctypes.c_uint32),
        ("family", ctypes.c_ubyte),
        ("address", ctypes.c_ubyte * 16),
        ("padding", ctypes.c_ubyte * 3),
    )
