"""The process that checks servers: forked, unprivileged, reaching what a worker reaches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from pyforwarder.runtime.loop import Loop
from pyforwarder.supervisor.child import ChildProcess, Serving
from pyforwarder.supervisor.health import Checker, Verdict
from pyforwarder.supervisor.messages import FROM_CHECKER, FaultyMessageError, Health, understand

if TYPE_CHECKING:
    from pyforwarder.config import Upstream
    from pyforwarder.runtime.channel import Channel
    from pyforwarder.worker.log import Log

_MOST_SHOWN: Final = 200


class CheckerProcess(ChildProcess[Verdict]):
    """Remembers which servers are down, for workers that are started later."""

    name = "health_checks"

    def __init__(
        self,
        loop: Loop,
        log: Log,
        *,
        user: str | None,
        close_in_child: Callable[[], None],
        tell: Callable[[Verdict], None],
    ) -> None:
        """`tell` is called in this process with every change."""
        super().__init__(loop, log, user=user, close_in_child=close_in_child)
        self._tell = tell
        self._upstreams: Mapping[str, Upstream] = {}
        self._down: dict[tuple[str, str], Verdict] = {}

    @property
    def down(self) -> list[Verdict]:
        """The servers that must get no pair just now."""
        return list(self._down.values())

    def inherit(self, down: Sequence[Verdict]) -> None:
        """Begin with what another daemon has found; the first look at each may say otherwise."""
        self._down = {(one.upstream, one.server): one for one in down}

    def change_to(self, upstreams: Mapping[str, Upstream]) -> None:
        """Check these from now on; servers that are checked no more count as up."""
        self._kill()
        self._upstreams = upstreams
        checked = {
            (name, str(server.address))
            for name, upstream in upstreams.items()
            if upstream.health is not None
            for server in upstream.servers
        }
        for key in [key for key in self._down if key not in checked]:
            del self._down[key]
            self._tell(Verdict(*key, up=True, why="checked no more"))
        self.start()

    @property
    def _is_wanted(self) -> bool:
        return any(upstream.health is not None for upstream in self._upstreams.values())

    def _prepare(self, channel: Channel) -> Callable[[], Serving]:
        def run() -> None:
            loop = Loop()
            Checker(loop, self._upstreams, lambda verdict: channel.send(verdict._asdict()))
            loop.run()

        return lambda: Serving(run)

    def _understand(self, message: dict[str, Any], fds: Sequence[int]) -> Verdict:
        said = understand(message, fds, FROM_CHECKER)
        assert isinstance(said, Health)
        upstream = self._upstreams.get(said.upstream)
        servers = () if upstream is None or upstream.health is None else upstream.servers
        if said.server not in {str(server.address) for server in servers}:
            raise FaultyMessageError("a verdict on what it does not check")
        return Verdict(said.upstream, said.server, up=said.up, why=said.why[:_MOST_SHOWN])

    def _heard(self, said: Verdict) -> None:
        key = (said.upstream, said.server)
        was_down = key in self._down
        if said.up:
            self._down.pop(key, None)
        else:
            self._down[key] = said
        if was_down == said.up:
            self._tell(said)
