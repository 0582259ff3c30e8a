"""The supervisor, as it is seen by processes that speak to a fleet's store."""

from __future__ import annotations

from typing import Any, Protocol


class Listening(Protocol):
    """A supervisor that is told something."""

    def send(self, message: dict[str, Any]) -> None:
        """Send the supervisor a message.

        Raises:
            OSError: it is gone.
        """


class Supervisor(Listening, Protocol):
    """A supervisor that says something, too."""

    def wait(self, timeout_s: float) -> dict[str, Any] | None:
        """Wait for a message of the supervisor, and return it; None: none came in time.

        Raises:
            EOFError: it is gone.
        """
