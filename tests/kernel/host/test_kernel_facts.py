"""What this kernel does with sockets in a sockhash: the facts that the design stands on.

Each test is one trap, tried with the naive program of facts.c. Where one fails, the kernel has
changed, and the line of bpf/redirect.c, datapath/sockmap/datapath.py or directions.py that its
comment names may have to.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import pwd
import random
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest

from pyforwarder.datapath.ebpf import syscall as bpf
from pyforwarder.datapath.ebpf.btf import VMLINUX, field_offsets
from pyforwarder.datapath.ebpf.loading import load_programs
from pyforwarder.datapath.proof.rig import loopback_pair
from pyforwarder.datapath.sockmap.maps import FIELDS
from pyforwarder.datapath.tcp_info import TCP_ESTABLISHED, queued_bytes, received
from pyforwarder.errors import LoadError
from pyforwarder.runtime.slowness import scaled_s
from pyforwarder.runtime.socket_options import SO_COOKIE
from tests.helpers.waiting import stays, wait_for

PASS_EMPTY, DROP_EMPTY, REDIRECT_EMPTY = range(3)
ENTRIES: Final = 16
LINGER_RESET: Final = struct.pack("ii", 1, 0)


def cookie_of(sock: socket.socket) -> bytes:
    return sock.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8)


class Redirector:
    """The maps and the program of facts.c."""

    def __init__(self) -> None:
        self.fds = [
            bpf.create_map(
                bpf.MapType.SOCKHASH, key_bytes=8, value_bytes=8, entries=ENTRIES, name="facts"
            ),
            bpf.create_map(bpf.MapType.HASH, key_bytes=8, value_bytes=16, entries=ENTRIES),
            bpf.create_map(
                bpf.MapType.ARRAY, key_bytes=4, value_bytes=16, entries=1, flags=bpf.F_MMAPABLE
            ),
        ]
        names = ("MAP_SOCKETS_FD", "MAP_ROUTES_FD", "MAP_SEEN_FD")
        (program,) = load_programs(
            str(Path(__file__).with_name("facts.c")),
            [("facts", "sk_skb")],
            defines={},
            maps=dict(zip(names, self.fds, strict=True)),
        )
        self.fds.append(program)
        bpf.attach(program, self.fds[0], bpf.AttachType.SK_SKB_STREAM_VERDICT)
        self.sockets = bpf.Map(self.fds[0], key_bytes=8, value_bytes=8)
        self._routes = bpf.Map(self.fds[1], key_bytes=8, value_bytes=16)
        self._seen = bpf.map_memory(self.fds[2], mmap.PAGESIZE, write=True)

    def route(self, source: socket.socket, target: bytes, *, empty: int = DROP_EMPTY) -> None:
        """Redirect what `source` receives to the socket with this cookie."""
        self._routes.update(cookie_of(source), target + empty.to_bytes(8, "little"))

    def insert(self, sock: socket.socket) -> None:
        self.sockets.update(cookie_of(sock), sock.fileno().to_bytes(8, "little"))

    def seen(self) -> tuple[int, int]:
        """Packets and bytes of routed sockets so far."""
        packets, size = struct.unpack_from("=QQ", self._seen)
        return packets, size

    def forget(self) -> None:
        """The routes and what was seen."""
        for key in self._routes.all_keys():
            self._routes.delete(key)
        self._seen[:16] = bytes(16)

    def close(self) -> None:
        self._seen.close()
        for fd in self.fds:
            os.close(fd)


@pytest.fixture(scope="module")
def loaded(network: None) -> Iterator[Redirector]:
    del network
    redirector = Redirector()
    yield redirector
    redirector.close()


@pytest.fixture
def redirector(loaded: Redirector) -> Redirector:
    """With nothing in it, and nothing seen yet."""
    assert loaded.sockets.all_keys() == []
    loaded.forget()
    return loaded


class Ends:
    """client <-> [a ... b] <-> server, nobody in between."""

    def __init__(self) -> None:
        self.client, self.a = loopback_pair()
        self.b, self.server = loopback_pair()
        for sock in (self.a, self.b):
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def close(self) -> None:
        for sock in (self.client, self.a, self.b, self.server):
            sock.close()


@pytest.fixture
def ends(redirector: Redirector) -> Iterator[Ends]:
    del redirector
    made = Ends()
    yield made
    made.close()


def join(
    redirector: Redirector, ends: Ends, *, empty: int = DROP_EMPTY, both_ways: bool = False
) -> None:
    """Redirect a to b, and b to a if asked; the target is in the map first."""
    redirector.route(ends.a, cookie_of(ends.b), empty=empty)
    if both_ways:
        redirector.route(ends.b, cookie_of(ends.a), empty=empty)
    redirector.insert(ends.b)
    redirector.insert(ends.a)


def kick(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)


def error_of(sock: socket.socket) -> int:
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)


def wait_for_bytes(sock: socket.socket, count: int) -> None:
    wait_for(lambda: received(sock).bytes_received == count, f"{count} bytes received")


def read_exactly(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        chunk = sock.recv(size - len(data))
        assert chunk, f"the end after {len(data)} of {size} bytes"
        data += chunk
    return data


def read_to_the_end(sock: socket.socket) -> tuple[int, str]:
    """How many bytes came, and how it ended."""
    count = 0
    while True:
        try:
            chunk = sock.recv(1 << 20)
        except OSError as error:
            return count, errno.errorcode[error.errno or 0]
        if not chunk:
            return count, "EOF"
        count += len(chunk)


def fill_beyond(target: socket.socket, sender: socket.socket, wanted: int = 1 << 16) -> int:
    """Send until `wanted` bytes are redirected that the target's TCP does not take; all sent.

    In pieces, so that the target's TCP fills up first.
    """
    sent = 0
    before = queued_bytes(target, has_connected=True)
    while sent - (queued_bytes(target, has_connected=True) - before) < wanted:
        sender.sendall(bytes(1 << 15))
        sent += 1 << 15
        deadline_s = time.monotonic() + 0.005
        while (
            queued_bytes(target, has_connected=True) - before < sent
            and time.monotonic() < deadline_s
        ):
            pass
    return sent


# Entering


def test_bytes_that_were_queued_before_are_not_seen_until_the_socket_is_kicked(
    redirector: Redirector, ends: Ends
) -> None:
    # SockmapDatapath._enter kicks with SO_RCVLOWAT, step 4.
    ends.client.sendall(b"queued")
    wait_for_bytes(ends.a, 6)
    join(redirector, ends)
    stays(lambda: redirector.seen() == (0, 0), "nothing seen", for_s=0.05)
    kick(ends.a)
    assert ends.server.recv(100) == b"queued"
    assert redirector.seen() == (1, 6)


def test_next_segment_kicks_as_well(redirector: Redirector, ends: Ends) -> None:
    ends.client.sendall(b"queued")
    wait_for_bytes(ends.a, 6)
    join(redirector, ends)
    ends.client.sendall(b" and more")
    assert read_exactly(ends.server, 15) == b"queued and more"


def test_packet_that_was_read_in_part_is_redirected_whole(
    redirector: Redirector, ends: Ends
) -> None:
    # Why join() demands that all that was received has been read.
    data = random.Random(1).randbytes(10_000)
    ends.client.sendall(data)
    wait_for_bytes(ends.a, 10_000)
    assert ends.a.recv(100) == data[:100]
    join(redirector, ends)
    kick(ends.a)
    assert read_exactly(ends.server, 10_000) == data  # the first 100 once more
    assert redirector.seen() == (1, 10_000)


def test_socket_in_close_wait_is_refused(redirector: Redirector, ends: Ends) -> None:
    # SockmapDatapath._enter: up.is_native.
    ends.client.shutdown(socket.SHUT_WR)
    wait_for(lambda: received(ends.a).state != TCP_ESTABLISHED, "FIN")
    with pytest.raises(OSError, match="not supported") as caught:
        redirector.insert(ends.a)
    assert caught.value.errno == errno.EOPNOTSUPP


def test_socket_that_only_listens_or_is_mptcp_does_not_become_a_pairs(
    redirector: Redirector,
) -> None:
    with (
        socket.socket() as unconnected,
        socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_MPTCP) as multipath,
    ):
        unconnected.bind(("127.0.0.1", 0))
        for sock in (unconnected, multipath):
            with pytest.raises(OSError, match="not supported"):
                redirector.insert(sock)


def test_value_that_is_looked_up_is_the_cookie(redirector: Redirector, ends: Ends) -> None:
    redirector.insert(ends.a)
    assert redirector.sockets.lookup(cookie_of(ends.a)) == cookie_of(ends.a)


def test_closed_socket_leaves_the_map_by_itself(redirector: Redirector, ends: Ends) -> None:
    # Why leave() does not delete it; a descriptor elsewhere keeps it in.
    redirector.insert(ends.a)
    copy = ends.a.dup()
    cookie = cookie_of(ends.a)
    ends.a.close()
    assert redirector.sockets.all_keys() == [cookie]
    copy.close()
    assert redirector.sockets.all_keys() == []


# Packets without bytes


def test_redirected_fin_breaks_the_target(redirector: Redirector, ends: Ends) -> None:
    # The first lines of verdict() in bpf/redirect.c.
    join(redirector, ends, empty=REDIRECT_EMPTY)
    ends.client.sendall(b"last words")
    assert ends.server.recv(100) == b"last words"
    ends.client.shutdown(socket.SHUT_WR)
    wait_for(lambda: error_of(ends.b) == errno.EPIPE, "EPIPE at the target")


@pytest.mark.parametrize(("empty", "error"), [(PASS_EMPTY, errno.EPIPE), (DROP_EMPTY, 0)])
def test_passed_fin_breaks_its_own_socket_if_redirected_bytes_wait_there(
    redirector: Redirector, ends: Ends, empty: int, error: int
) -> None:
    # Why verdict() drops it. Dropped, it harms nobody, and EPOLLRDHUP has told of it.
    join(redirector, ends, empty=empty, both_ways=True)
    sent = fill_beyond(ends.a, ends.server)
    ends.client.shutdown(socket.SHUT_WR)
    wait_for(lambda: received(ends.a).state != TCP_ESTABLISHED, "FIN")
    ends.client.settimeout(scaled_s(5))
    if error:
        got = 0

        def read_on() -> bool:
            nonlocal got
            with contextlib.suppress(BlockingIOError):
                got += len(ends.client.recv(1 << 20, socket.MSG_DONTWAIT))
            return error_of(ends.a) == error

        wait_for(read_on, "EPIPE")
    else:
        assert len(read_exactly(ends.client, sent)) == sent
        ends.server.sendall(b"still there")
        assert read_exactly(ends.client, 11) == b"still there"
        assert error_of(ends.a) == 0


def test_fin_is_told_to_epoll_and_is_not_carried_on(redirector: Redirector, ends: Ends) -> None:
    join(redirector, ends)
    poll = select.epoll()
    try:
        poll.register(ends.a, select.EPOLLRDHUP | select.EPOLLET)
        ends.client.shutdown(socket.SHUT_WR)
        assert poll.poll(5) == [(ends.a.fileno(), select.EPOLLRDHUP)]
        ends.server.setblocking(False)
        with pytest.raises(BlockingIOError):
            ends.server.recv(1)
    finally:
        poll.close()


# Waking


@pytest.mark.parametrize(("mask", "wakes"), [(0, False), (select.EPOLLIN, True)])
def test_redirected_bytes_wake_only_a_poller_that_asks_for_bytes(
    redirector: Redirector, ends: Ends, mask: int, wakes: bool
) -> None:
    # SockmapDirections._watch: a sleeping direction asks for EPOLLRDHUP alone.
    join(redirector, ends)
    poll = select.epoll()
    returned: list[int] = []

    def sleep_until_the_fin() -> None:
        while not returned or not returned[-1] & select.EPOLLRDHUP:
            returned.extend(mask for _, mask in poll.poll(10))

    try:
        poll.register(ends.a, select.EPOLLRDHUP | select.EPOLLET | mask)
        sleeper = threading.Thread(target=sleep_until_the_fin, daemon=True)
        sleeper.start()
        wait_for(lambda: waits_in(sleeper) in ("ep_poll", "do_epoll_wait"), "epoll_wait()")
        before = switches_of(sleeper)
        for _ in range(23):
            ends.client.sendall(b"message")
            assert ends.server.recv(100) == b"message"
        # epoll_wait() returns only if it looks before the bytes have moved on; it is woken anyway.
        # A last wakeup may still be on its way; without any, none comes.
        if wakes:
            wait_for(lambda: switches_of(sleeper) > before, "wakeup")
        else:
            assert switches_of(sleeper) == before
            assert returned == []
        ends.client.shutdown(socket.SHUT_WR)
        sleeper.join(10)
        assert returned[-1] & select.EPOLLRDHUP
    finally:
        poll.close()


def waits_in(thread: threading.Thread) -> str:
    """The kernel function that a thread sleeps in: ep_poll or do_epoll_wait, futex_..., 0."""
    return Path(f"/proc/self/task/{thread.native_id}/wchan").read_text()


def switches_of(thread: threading.Thread) -> int:
    """How often a thread has gone to sleep."""
    status = Path(f"/proc/self/task/{thread.native_id}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("voluntary_ctxt_switches"))
    return int(line.split()[1])


# The end


@pytest.mark.parametrize(("linger", "end"), [(bytes(8), "EOF"), (LINGER_RESET, "ECONNRESET")])
def test_close_drops_what_waits_and_hides_it_unless_it_is_a_reset(
    redirector: Redirector, ends: Ends, linger: bytes, end: str
) -> None:
    # Why every socket has SO_LINGER 0 from its first moment until all is delivered.
    join(redirector, ends)
    sent = fill_beyond(ends.b, ends.client)
    ends.b.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    ends.b.close()
    count, ended = read_to_the_end(ends.server)
    assert count < sent
    assert ended == end


def test_nothing_slows_a_sender_whose_bytes_are_redirected(
    redirector: Redirector, ends: Ends
) -> None:
    # Why redirect.c has a fuse: far more than both sockets' buffers hold is taken for a reader
    # that never reads.
    join(redirector, ends)
    ends.client.settimeout(scaled_s(10))
    for _ in range(48):
        ends.client.sendall(bytes(1 << 20))
    wait_for_bytes(ends.a, 48 << 20)
    assert (48 << 20) - queued_bytes(ends.b, has_connected=True) > 32 << 20


@pytest.mark.parametrize("behind_a_backlog", [False, True])
def test_passed_bytes_are_charged_to_nobody_behind_a_backlog(
    redirector: Redirector, ends: Ends, behind_a_backlog: bool
) -> None:
    # Why redirect.c redirects no more than the target's send buffer can take: what is left over
    # would wait in the queue that the target's own passed packets go through.
    redirector.route(ends.b, cookie_of(ends.a))
    redirector.insert(ends.a)
    redirector.insert(ends.b)
    for sock in (ends.client, ends.a):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 17)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 17)
    if behind_a_backlog:
        fill_beyond(ends.a, ends.server, 2 << 20)
    ends.client.settimeout(5 if behind_a_backlog else 0.3)
    taken = 0
    with contextlib.suppress(TimeoutError):
        while taken < 24 << 20:
            taken += ends.client.send(bytes(1 << 16))
    # Nobody has read a byte.
    if behind_a_backlog:
        assert taken == 24 << 20
    else:
        assert taken < 4 << 20


def test_bytes_for_a_target_that_is_not_in_the_map_are_lost(
    redirector: Redirector, ends: Ends
) -> None:
    # Why verdict() looks the target up first.
    redirector.route(ends.a, cookie_of(ends.b))
    redirector.insert(ends.a)
    ends.client.sendall(b"into nowhere")
    wait_for(lambda: redirector.seen() == (1, 12), "packet")
    with pytest.raises(BlockingIOError):
        ends.a.recv(100)
    redirector.insert(ends.b)
    ends.client.sendall(b"now")
    assert ends.server.recv(100) == b"now"


# Counting


def test_tcp_info_counts_every_byte_that_was_queued(redirector: Redirector, ends: Ends) -> None:
    # The drain test: what was redirected has arrived in the target's TCP when queued_bytes says so.
    join(redirector, ends)
    ends.b.send(b"by hand")
    ends.client.sendall(bytes(100_003))
    assert len(read_exactly(ends.server, 100_010)) == 100_010
    assert redirector.seen()[1] == 100_003
    assert queued_bytes(ends.b, has_connected=True) == 100_010
    assert received(ends.a).bytes_received == 100_003


def test_tcp_info_counts_what_the_peer_has_no_room_for(redirector: Redirector, ends: Ends) -> None:
    join(redirector, ends)
    ends.b.setblocking(False)
    taken = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            taken += ends.b.send(bytes(1 << 16))
    assert queued_bytes(ends.b, has_connected=True) == taken


def test_tcp_info_counts_a_fin_as_a_byte_received(ends: Ends) -> None:
    ends.client.sendall(b"12345")
    ends.client.shutdown(socket.SHUT_WR)
    wait_for_bytes(ends.a, 6)
    assert received(ends.a).state != TCP_ESTABLISHED


# Privileges


def as_nobody(action: Callable[[], bool]) -> bool:
    """Whether `action` says yes in a child without any privilege."""
    nobody = pwd.getpwnam("nobody")
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setgroups([])
            os.setresgid(nobody.pw_gid, nobody.pw_gid, nobody.pw_gid)
            os.setresuid(nobody.pw_uid, nobody.pw_uid, nobody.pw_uid)
            code = 0 if action() else 2
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_unprivileged_process_inserts_and_deletes_through_inherited_descriptors(
    redirector: Redirector, ends: Ends
) -> None:
    # Why workers need no capability.
    def insert() -> bool:
        redirector.insert(ends.a)
        redirector.route(ends.a, bytes(8))
        return redirector.sockets.all_keys() == [cookie_of(ends.a)]

    assert as_nobody(insert)
    assert redirector.sockets.all_keys() == [cookie_of(ends.a)]

    def delete() -> bool:
        redirector.sockets.delete(cookie_of(ends.a))
        return redirector.sockets.all_keys() == []

    assert as_nobody(delete)


def test_unprivileged_process_writes_the_memory_of_an_inherited_array(
    redirector: Redirector,
) -> None:
    def write() -> bool:
        with bpf.map_memory(redirector.fds[2], mmap.PAGESIZE, write=True) as memory:
            memory[8:16] = (4711).to_bytes(8, "little")
        return True

    assert as_nobody(write)
    assert redirector.seen() == (0, 4711)


def test_unprivileged_process_makes_no_maps() -> None:
    def create() -> bool:
        try:
            os.close(bpf.create_map(bpf.MapType.SOCKHASH, key_bytes=8, value_bytes=8, entries=1))
        except PermissionError:
            return True
        return False

    assert as_nobody(create)


# Types


def test_fields_that_the_programs_need_are_in_this_kernel() -> None:
    offsets = field_offsets(FIELDS)
    assert set(offsets) == {(name, field) for name, fields in FIELDS.items() for field in fields}
    # Behind the inet_connection_sock that a tcp_sock begins with, and inside the structure.
    assert 500 < offsets["tcp_sock", "write_seq"] < 4096


def test_layout_that_c_fixes_is_found_in_this_kernel() -> None:
    # struct sock_common: skc_portpair is the union of skc_dport and skc_num (net/sock.h).
    wanted = ("skc_portpair", "skc_dport", "skc_num", "skc_daddr", "skc_addrpair")
    offsets = field_offsets(
        {"sock_common": wanted, "tcp_sock": ("inet_conn",), "sock": ("__sk_common",)}
    )
    assert offsets["tcp_sock", "inet_conn"] == offsets["sock", "__sk_common"] == 0
    dport = offsets["sock_common", "skc_dport"]
    assert dport == offsets["sock_common", "skc_portpair"]
    assert offsets["sock_common", "skc_num"] == dport + 2
    assert offsets["sock_common", "skc_addrpair"] == offsets["sock_common", "skc_daddr"] == 0


def test_field_that_no_kernel_has_is_a_load_error() -> None:
    assert VMLINUX.exists()
    with pytest.raises(LoadError, match=r"no tcp_sock\.no_such_field"):
        field_offsets({"tcp_sock": ("no_such_field",)})
