"""Records what a real client sends first, into first_packets.json beside this file.

    python tests/data/capture.py NAME --origin TEXT [--answer HEX]... -- COMMAND...

`{port}` in the command becomes the port of a listener on 127.0.0.1.  The client's bytes are read
until it has been silent for half a second; each --answer is then sent and the next turn recorded.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import subprocess
from pathlib import Path

RECORDS = Path(__file__).with_name("first_packets.json")
SILENCE_S = 0.5
CONNECT_S = 20.0


def read_turn(connection: socket.socket) -> bytes:
    """What the client sends until it pauses or closes."""
    received = b""
    with contextlib.suppress(TimeoutError):
        while chunk := connection.recv(65536):
            received += chunk
    return received


def capture(command: list[str], answers: list[bytes]) -> list[str]:
    """The client's turns, as hexadecimal digits."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(CONNECT_S)
        port = listener.getsockname()[1]
        client = subprocess.Popen(
            [word.replace("{port}", str(port)) for word in command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(SILENCE_S)
                turns = [read_turn(connection)]
                for answer in answers:
                    connection.sendall(answer)
                    turns.append(read_turn(connection))
        finally:
            client.kill()
            client.wait()
    return [turn.hex() for turn in turns]


def main() -> None:
    """Record one client."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--answer", action="append", default=[], type=bytes.fromhex)
    parser.add_argument("--origin", required=True, help="program and version")
    parser.add_argument("command", nargs="+")
    options = parser.parse_args()
    turns = capture(options.command, options.answer)
    records = json.loads(RECORDS.read_text()) if RECORDS.exists() else {}
    command = " ".join([os.path.basename(options.command[0]), *options.command[1:]])
    records[options.name] = {"origin": f"{options.origin}: {command}", "turns": turns}
    RECORDS.write_text(json.dumps(records, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
