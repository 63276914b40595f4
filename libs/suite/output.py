"""What ``datasync up`` writes: the lines of its services and its own."""

import json
from contextlib import suppress
from datetime import UTC, datetime
from typing import TextIO

from libs.contracts.services import SERVICES
from libs.core.clock import isoformat_z

LEVELS = {
    "process_died": "error",
    "last_words": "error",
    "cannot_start": "error",
    "line_too_long": "warning",
    "killing": "warning",
}
"""The levels of the suite's own events that are not informational."""


class Output:
    """The output of the suite and its services on one stream: readable on a terminal, JSON lines elsewhere."""

    def __init__(self, stream: TextIO, *, readable: bool) -> None:
        self.readable = readable
        self._stream = stream
        self._width = max(len(service.name) for service in SERVICES)

    def say(self, event: str, text: str, **fields: object) -> None:
        """Write a line of the suite: ``text`` for people, ``event`` and ``fields`` for programs."""
        if self.readable:
            self._write(f"{'datasync':<{self._width}} | {text}")
            return
        self._write_json("supervisor", event, LEVELS.get(event, "info"), text=text, **fields)

    def relay(self, service: str, line: str) -> None:
        """Pass on a line that a service wrote."""
        if self.readable:
            self._write(f"{service:<{self._width}} | {line}")
        elif line.startswith("{"):
            self._write(line)
        else:
            self._write_json(service, "output", "warning", line=line)

    def _write_json(self, service: str, event: str, level: str, **fields: object) -> None:
        """Write a line with the same fields as the services' own."""
        time_ = isoformat_z(datetime.now(UTC))
        self._write(json.dumps({"event": event, **fields, "level": level, "timestamp": time_, "service": service}))

    def _write(self, line: str) -> None:
        # The suite keeps running when its terminal is closed.
        with suppress(OSError):
            print(line, file=self._stream, flush=True)
