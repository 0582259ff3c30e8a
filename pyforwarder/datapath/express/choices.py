"""The maps of choices among servers, and of the outcomes of connections to them."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import secrets
import struct
from collections.abc import Callable, Collection
from typing import Final

from pyforwarder.core.express.choosing import LOGS, Choice, InTurn, Target
from pyforwarder.datapath.ebpf import syscall as bpf
from pyforwarder.datapath.express import choice_abi as abi

MOST_CHOICES: Final = 512
# A number that no listener refers to any more is reused only after so long: by then no program runs
# that has read it before.
REST_S: Final = 10.0
_NUMBER: Final = struct.Struct("=I")


class Choices:
    """The maps of choices; closed by `close`."""

    def __init__(self, targets: int) -> None:
        """Create the maps; outcomes are counted of `targets` targets.

        Raises:
            OSError: the kernel refuses.
        """
        array = bpf.MapType.ARRAY
        rooms = {
            "choices": (ctypes.sizeof(abi.Choice), MOST_CHOICES, 0),
            "logs": (ctypes.sizeof(abi.Logs), 1, 0),
            "outcomes": (ctypes.sizeof(abi.Outcome), targets, bpf.F_MMAPABLE),
        }
        self._fds: dict[str, int] = {}
        self._used: dict[Choice, int] = {}
        self._resting: dict[int, float] = {}  # number -> until when
        with contextlib.ExitStack() as opened:
            for name, (value_bytes, entries, flags) in rooms.items():
                fd = bpf.create_map(
                    array,
                    key_bytes=4,
                    value_bytes=value_bytes,
                    entries=entries,
                    flags=flags,
                    name=f"pf_ex_{name}",
                )
                opened.callback(os.close, fd)
                self._fds[name] = fd
            size = targets * ctypes.sizeof(abi.Outcome)
            self._outcomes = bpf.map_memory(self._fds["outcomes"], size, write=False)
            opened.callback(self._outcomes.close)
            self._choices = bpf.Map(
                self._fds["choices"], key_bytes=4, value_bytes=ctypes.sizeof(abi.Choice)
            )
            self._counts = bpf.Map(
                self._fds["outcomes"], key_bytes=4, value_bytes=ctypes.sizeof(abi.Outcome)
            )
            logs = bpf.Map(self._fds["logs"], key_bytes=4, value_bytes=ctypes.sizeof(abi.Logs))
            logs.update(_NUMBER.pack(0), struct.pack(f"={len(LOGS)}Q", *LOGS))
            self._opened = opened.pop_all()

    @property
    def maps(self) -> dict[str, int]:
        """The descriptors, by the macros for them in the programs."""
        return {f"MAP_EXPRESS_{name.upper()}_FD": fd for name, fd in self._fds.items()}

    def number_of(
        self, choice: Choice, target_of: Callable[[Target], int], now_s: float
    ) -> int | None:
        """The value of a rule's target that refers to a choice; None: there is no room.

        A new choice is written to the map. `target_of` gives the index of a server in the map of
        targets.
        """
        number = self._used.get(choice)
        if number is None:
            taken = set(self._used.values())
            number = next(
                (
                    one
                    for one in range(MOST_CHOICES)
                    if one not in taken and self._resting.get(one, 0.0) <= now_s
                ),
                None,
            )
            if number is None:
                return None
            self.write(number, choice, target_of)
            self._used[choice] = number
            self._resting.pop(number, None)
        return number | abi.CHOICE

    def keep(self, choices: Collection[Choice], now_s: float) -> None:
        """From here on listeners refer to these choices only."""
        for choice in [one for one in self._used if one not in choices]:
            self._resting[self._used.pop(choice)] = now_s + REST_S

    def rests_until_s(self, now_s: float) -> float:
        """When the next number may be reused; infinity if none is waiting for that."""
        return min((one for one in self._resting.values() if one > now_s), default=math.inf)

    def write(self, number: int, choice: Choice, target_of: Callable[[Target], int]) -> None:
        """Write a choice at a number that no listener refers to."""
        record = abi.Choice(count=len(choice.servers))
        if isinstance(choice, InTurn):
            record.kind = abi.Kind.IN_TURN
            # A random first turn: with many changes and few connections between them, the first
            # server would get nearly all.
            record.turn = secrets.randbelow(len(choice.servers))
            for place, server in enumerate(choice.servers):
                record.in_turn[place] = target_of(Target(server, choice.source))
        else:
            record.kind = abi.Kind.BY_CLIENT
            for place, one in enumerate(choice.servers):
                target = target_of(Target(one.server, choice.source))
                record.drawing[place] = abi.Drawing(one.seed, target, one.weight)
        self._choices.update(_NUMBER.pack(number), bytes(record))

    def outcome(self, target: int) -> abi.Outcome:
        """The outcomes of the connections to a target so far."""
        return abi.Outcome.from_buffer_copy(self._outcomes, target * ctypes.sizeof(abi.Outcome))

    def failures(self, most: int) -> int:
        """How many connections to the targets up to `most` have failed."""
        words = ctypes.sizeof(abi.Outcome) // 4
        with memoryview(self._outcomes) as whole, whole.cast("I") as numbers:
            first = abi.Outcome.failed.offset // 4
            return sum(numbers[first : (most + 1) * words : words].tolist())

    def forget_outcome(self, target: int) -> None:
        """Zero the outcomes of a target, which belongs to another server from here on."""
        self._counts.update(_NUMBER.pack(target), bytes(abi.Outcome()))

    def close(self) -> None:
        """Close the maps; loaded programs keep those that they use."""
        self._opened.close()
