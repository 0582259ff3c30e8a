"""Which kernels are booted, and what `doctor` must say on each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from kernels.doctor import Expected

CLOUD: Final = "linux-image-cloud-amd64"

# What every guest but the last runs: kernel facts, the conformance suite on every datapath of a
# kernel, and sockmap. What measures, or needs two processors, is left to the host.
_OF_THE_KERNEL: Final = (
    "tests/kernel/host/test_host.py",
    "tests/kernel/host/test_kernel_facts.py",
    "tests/kernel/datapath/test_conformance.py",
    "tests/kernel/sockmap/test_sockmap.py",
    "tests/kernel/sockmap/test_walls.py",
    "tests/kernel/sockmap/test_teardown.py",
)
# A daemon's programs and the view, with each of Debian's releases.
TESTS: Final = (
    *_OF_THE_KERNEL,
    "tests/kernel/splice/test_splice.py::test_flush_resets_both_ends",
    "tests/kernel/host/test_attaching.py::test_kill_leaves_them_and_the_next_up_replaces_them",
    "tests/kernel/view/test_view.py",
)
# The commands as a user calls them. All of them are played with the kernel of Debian 13 where it is
# locked down, and on Debian 12 in a container; on its kernel those that show what that says.
_AS_A_USER: Final = "tests/kernel/users/test_as_a_user.py"
_OF_THE_VIEW: Final = tuple(
    f"{_AS_A_USER}::{name}"
    for name in (
        "test_a_held_connection_is_shown_everywhere_and_can_be_flushed",
        "test_after_kill_9_the_next_up_serves_and_down_leaves_nothing",
    )
)
_EXPRESS: Final = "tests/kernel/express/test_connect.py::"
# On the oldest of them: whether the verifier takes the programs of express, and some conversations.
_OF_EXPRESS: Final = (
    "tests/kernel/host/test_verifier.py",
    f"{_EXPRESS}test_bytes_and_ends_both_ways",
    f"{_EXPRESS}test_a_server_that_refuses",
    "tests/kernel/express/test_choice.py::test_turns_come_round",
    "tests/kernel/express/test_choice.py::test_a_choice_that_is_not_certain_is_left_to_userspace",
)
# Where programs are attached by tcx: loading is nearly all that it costs, so a few of these.
_SOME_OF_EXPRESS: Final = tuple(
    f"{_EXPRESS}{name}"
    for name in (
        "test_bytes_and_ends_both_ways[lo-lo-4]",
        "test_bytes_and_ends_both_ways[far-far-6]",
        "test_a_server_that_refuses[far-far-4]",
    )
)
# Each takes ten seconds or more of an emulated processor, and says nothing about a kernel that the
# others do not.
NOT_HERE: Final = tuple(
    f"tests/kernel/view/test_view.py::{name}"
    for name in (
        "test_no_line_mixes_two_descriptions",
        "test_no_line_mixes_two_connections_whose_slot_changes_hands",
        "test_pairs_that_stay_are_all_there_once_while_others_come_and_go",
        "test_several_pairs_at_a_visit_are_all_there_once_in_order",
        "test_ten_thousand_pairs_are_all_there_once_in_order",
        "test_the_header_says_when_nobody_can_write_any_more",
        "test_many_readers_at_once_get_every_line_once",
        "test_stats_is_the_same_read_by_small_pieces_and_by_many",
    )
)


# For pytest: what has a stand-in for a datapath, in tests of every datapath.
NO_KERNEL: Final = ("-k", "not fake")


@dataclass(frozen=True, slots=True)
class Guest:
    """A kernel package of a suite of Debian, and the userland of that suite."""

    name: str
    suite: str  # of the userland: bookworm, trixie
    release: str  # where the kernel comes from: the suite, or its backports
    package: str
    expected: Expected | None = None  # None: of a kernel that somebody names, nothing is known
    command_line: str = ""  # more for the kernel
    tests: tuple[str, ...] = TESTS
    left_out: tuple[str, ...] = field(default=NOT_HERE)

    def userland(self) -> str:
        """For people."""
        return {"bookworm": "Debian 12", "trixie": "Debian 13"}.get(self.suite, self.suite)


ALL: Final = (
    Guest(
        "6.1",
        "bookworm",
        "bookworm",
        CLOUD,
        Expected(attach="clsact"),
        tests=(*TESTS, *_OF_THE_VIEW, *_OF_EXPRESS),
    ),
    Guest("6.12", "trixie", "trixie", CLOUD, Expected(), tests=(*TESTS, *_SOME_OF_EXPRESS)),
    # All of it is for the two before; what is new on the newest is the kernel itself.
    Guest("backports", "trixie", "trixie-backports", CLOUD, Expected(), tests=_OF_THE_KERNEL),
    Guest(
        "lockdown",
        "trixie",
        "trixie",
        CLOUD,
        Expected(lockdown="integrity"),
        command_line="lockdown=integrity",
        # the datapaths prove themselves in `doctor`; what lockdown may forbid is loading and pins
        tests=("tests/kernel/host/test_host.py", _AS_A_USER),
    ),
)


class UnknownGuestError(ValueError):
    """A name that is neither in the table nor SUITE/PACKAGE."""


def named(name: str) -> Guest:
    """The guest of that name, or one for SUITE/PACKAGE and RELEASE/PACKAGE[=VERSION].

    Raises:
        UnknownGuestError: it is neither.
    """
    for guest in ALL:
        if guest.name == name:
            return guest
    release, slash, package = name.partition("/")
    suite = release.removesuffix("-backports")
    if not slash or not package or suite not in {"bookworm", "trixie"}:
        known = ", ".join(guest.name for guest in ALL)
        raise UnknownGuestError(
            f"{name!r} is none of {known}, and not RELEASE/PACKAGE such as "
            f"trixie-backports/{CLOUD} or bookworm/{CLOUD}=6.1.176-1"
        )
    return Guest(name, suite, release, package)
