"""Programs on interfaces by tcx links (Linux 6.6): one ends with its last descriptor and pin.

    DIRECTORY/in_N out_N    the links to interface N

Source: kernel/bpf/tcx.c.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pyforwarder.datapath.ebpf import syscall as bpf

if TYPE_CHECKING:
    from pyforwarder.datapath.attach.base import Kind, Side

_TYPES: Final = {"in": bpf.AttachType.TCX_INGRESS, "out": bpf.AttachType.TCX_EGRESS}
_PIN: Final = re.compile(r"(?:in|out)_(\d+)")
_NO_INTERFACE: Final = 0


@functools.cache
def is_supported() -> bool:
    """Whether this kernel has tcx; asked once per process.

    It is asked what is attached to an interface that cannot be. One with tcx looks for the
    interface (ENODEV); one without does not know the place, 6.1 like a 6.6 that was built without
    it (EINVAL). Nothing else can lead to either answer.

    Raises:
        OSError: the kernel says neither, EPERM for example.
    """
    try:
        bpf.query_interface(_NO_INTERFACE, bpf.AttachType.TCX_INGRESS)
    except OSError as error:
        if error.errno == errno.ENODEV:
            return True
        if error.errno == errno.EINVAL:
            return False
        raise
    raise OSError(errno.EPROTO, "tcx: the kernel has an interface of number 0")


def pinned_on(directory: Path) -> set[int]:
    """The interfaces to which links are pinned there."""
    with contextlib.suppress(OSError):
        matches = [_PIN.fullmatch(path.name) for path in directory.iterdir()]
        return {int(match[1]) for match in matches if match}
    return set()


def remove(directory: Path) -> None:
    """Remove the pins of links there: programs that nobody else holds leave. Never raises."""
    with contextlib.suppress(OSError):
        for path in [path for path in directory.iterdir() if _PIN.fullmatch(path.name)]:
            path.unlink(missing_ok=True)


class TcxAttacher:
    """Links, which stay as long as a process has them open or they are pinned."""

    kind: Kind = "tcx"

    def __init__(self, directory: Path | None, *, kept_with: str) -> None:
        """`directory` is where they are pinned, and links that are pinned there are used.

        `kept_with` is what stands there as soon as they are.
        """
        self._directory = directory
        self._kept_with = kept_with
        self._fds: dict[tuple[Side, int], int] = {}
        self._program_fds: dict[Side, int] = {}  # the caller's

    def has(self, interface: int, side: Side) -> bool:
        """Whether there is a link of ours."""
        return (side, interface) in self._fds

    def attach(self, program_fd: int, interface: int, side: Side) -> None:
        """Link it, or put it in the place of the one that is linked by a pin."""
        self._fds[side, interface] = self._link(program_fd, interface, side)
        self._program_fds[side] = program_fd
        # Asked of the file system: the keeper was there before the pins were.
        if self._directory is not None and (self._directory / self._kept_with).exists():
            self._pin(side, interface)

    def _link(self, program_fd: int, interface: int, side: Side) -> int:
        if self._directory is not None:
            link = -1
            try:
                link = bpf.open_pin(self._directory / f"{side}_{interface}")
                bpf.update_link(link, program_fd)
            except OSError:  # none, or of an interface that was made anew since
                if link >= 0:
                    os.close(link)
            else:
                return link
        return bpf.link_interface(program_fd, interface, _TYPES[side])

    def _pin(self, side: Side, interface: int) -> None:
        assert self._directory is not None
        path = self._directory / f"{side}_{interface}"
        path.unlink(missing_ok=True)
        bpf.pin(self._fds[side, interface], path)

    def verify(self, interface: int, side: Side) -> None:
        """The kernel refuses an update of a link whose interface is gone."""
        link = self._fds.get((side, interface))
        if link is not None:
            try:
                bpf.update_link(link, self._program_fds[side])
            except OSError:
                os.close(self._fds.pop((side, interface)))

    def interfaces(self) -> set[int]:
        """Where links are."""
        return {interface for _, interface in self._fds}

    def detach(self, interface: int, side: Side) -> None:
        """The link stays where others have it open, and holds nothing."""
        link = self._fds.pop((side, interface), -1)
        if link >= 0:
            with contextlib.suppress(OSError):  # its interface is gone, and it is nowhere
                bpf.detach_link(link)
            os.close(link)
        if self._directory is not None:
            with contextlib.suppress(OSError):
                (self._directory / f"{side}_{interface}").unlink(missing_ok=True)

    def clear(self) -> None:
        """Links end with their pins."""
        if self._directory is not None:
            remove(self._directory)

    def keep(self) -> set[str]:
        """Pin them."""
        for side, interface in self._fds:
            self._pin(side, interface)
        return {f"{side}_{interface}" for side, interface in self._fds}

    def close(self) -> None:
        """Close the descriptors."""
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()
