"""What workers report during a run, as plain documents: its progress and its log lines."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from libs.contracts.internal import LogLine, StreamProgress
from libs.core.clock import Clock
from libs.eventsourcing.documents import Documents
from libs.mongodb.client import ASCENDING, DESCENDING, BulkWriteError, Document, DuplicateKeyError, IndexModel

LogLevel = Literal["info", "warning", "error"]

PROGRESS = "run_progress"
LOGS = "run_logs"

LINES_PER_ATTEMPT_MAX = 100_000
LAST_LINES_KEPT = 100
MESSAGE_LENGTH_MAX = 16_384
PAGE_LINES_MAX = 10_000

_SEQUENCE_BITS = 24
_CLOSING = 2**_SEQUENCE_BITS - 1
"""A line's ordinal combines its epoch and its number. It stays below 2^53, the largest integer exact in browsers."""


@dataclass(frozen=True, slots=True)
class LogPage:
    """Lines, oldest first, and the cursors for the pages before and after them."""

    lines: list[Document]
    older_cursor: int
    newer_cursor: int
    has_more_older: bool
    has_more_newer: bool


# Documents of earlier versions have ``created_at`` instead and expire by those versions' index.
_EXPIRY = IndexModel([("expires_at", ASCENDING)], expireAfterSeconds=0)
INDEXES = {
    PROGRESS: [_EXPIRY],
    LOGS: [_EXPIRY, IndexModel([("run_id", ASCENDING), ("ordinal", ASCENDING)])],
}


class RunRecords:
    """Reads and writes progress and logs. The caller checks that it may access the run.

    Args:
        keep_seconds: how long after it was written a record expires.
    """

    def __init__(self, documents: Documents, clock: Clock, keep_seconds: float) -> None:
        self._progress = documents.plain(PROGRESS)
        self._logs = documents.plain(LOGS)
        self._clock = clock
        self._keep = timedelta(seconds=keep_seconds)

    async def save_progress(self, run_id: str, epoch: int, changed: Sequence[StreamProgress]) -> None:
        """Update the progress of streams. An epoch's first report replaces the progress of earlier ones."""
        if not changed:
            return
        before = await self._progress.find_one({"_id": run_id, "epoch": epoch})
        streams = {(stream["namespace"], stream["name"]): stream for stream in (before or {}).get("streams", ())}
        streams |= {(stream.namespace, stream.name): stream.model_dump() for stream in changed}
        document = {"epoch": epoch, "streams": list(streams.values()), "expires_at": self._expiry()}
        await self._progress.replace_one({"_id": run_id}, document, upsert=True)

    async def progress(self, run_id: str) -> list[StreamProgress]:
        """The last reported progress of each stream."""
        document = await self._progress.find_one({"_id": run_id})
        streams = [] if document is None else document["streams"]
        return [StreamProgress.model_validate(stream, extra="ignore") for stream in streams]

    async def add_lines(
        self, run_id: str, epoch: int, first: int, lines: Sequence[LogLine], *, last: bool = False
    ) -> None:
        """Add lines numbered from ``first`` within the epoch; a repeated line is stored once.

        If an attempt writes more than ``LINES_PER_ATTEMPT_MAX`` lines, only those and its last ones are stored.
        """
        expires_at = self._expiry()
        kept_from = max(0, len(lines) - LAST_LINES_KEPT) if last else len(lines)
        documents = [
            _line(run_id, epoch, min(first, LINES_PER_ATTEMPT_MAX) + index, line) | {"expires_at": expires_at}
            for index, line in enumerate(lines)
            if first + index < LINES_PER_ATTEMPT_MAX or index >= kept_from
        ]
        if not documents:
            return
        try:
            await self._logs.insert_many(documents, ordered=False)
        except BulkWriteError as error:
            if any(item["code"] != 11000 for item in error.details["writeErrors"]):
                raise

    async def close_attempt(self, run_id: str, epoch: int, level: LogLevel, message: str) -> None:
        """Add the attempt's last line, after all lines of its worker, unless there is one already."""
        now = self._clock.now()
        line = _line(run_id, epoch, _CLOSING, LogLine(time=now, level=level, message=message))
        with contextlib.suppress(DuplicateKeyError):
            await self._logs.insert_one(line | {"expires_at": self._expiry()})

    async def page(self, run_id: str, cursor: int, limit: int, *, newer: bool = False) -> LogPage:
        """Up to ``limit`` lines on one side of a cursor; -1 means the end of the log, in either direction."""
        from_end = cursor < 0
        newer = newer and not from_end
        bound: Document = {} if from_end else {"ordinal": {"$gt" if newer else "$lt": cursor}}
        order = ASCENDING if newer else DESCENDING
        found = await self._logs.find({"run_id": run_id, **bound}).sort("ordinal", order).to_list(limit + 1)
        more, lines = len(found) > limit, found[:limit]
        if not newer:
            lines.reverse()
        oldest, newest = (lines[0]["ordinal"], lines[-1]["ordinal"]) if lines else (max(cursor, 0), max(cursor, 0))
        if newer:
            return LogPage(lines, oldest, newest, await self._any(run_id, {"$lt": oldest}), more)
        newer_there = not from_end and await self._any(run_id, {"$gt": newest} if lines else {"$gte": cursor})
        return LogPage(lines, oldest, newest, more, newer_there)

    def _expiry(self) -> datetime:
        return self._clock.now() + self._keep

    async def _any(self, run_id: str, ordinal: Document) -> bool:
        return await self._logs.find_one({"run_id": run_id, "ordinal": ordinal}, {"_id": 1}) is not None


def _line(run_id: str, epoch: int, sequence: int, line: LogLine) -> Document:
    ordinal = epoch << _SEQUENCE_BITS | sequence
    return {
        "_id": f"{run_id}/{ordinal}",
        "run_id": run_id,
        "ordinal": ordinal,
        "time": line.time,
        "level": line.level,
        "message": line.message[:MESSAGE_LENGTH_MAX],
    }


def percent_done(streams: Sequence[StreamProgress]) -> int:
    """0 to 99: by rows if every stream's total is known, by completed streams otherwise."""
    if not streams:
        return 0
    totals = [stream.rows_total for stream in streams]
    if all(total is not None for total in totals) and sum(total or 0 for total in totals) > 0:
        done = sum(
            stream.rows_total or 0 if stream.state == "completed" else min(stream.rows_written, stream.rows_total or 0)
            for stream in streams
        )
        return min(99, 100 * done // sum(total or 0 for total in totals))
    finished = sum(_fraction(stream) for stream in streams)
    return min(99, int(100 * finished / len(streams)))


def _fraction(stream: StreamProgress) -> float:
    if stream.state == "completed":
        return 1.0
    return min(0.99, stream.rows_written / stream.rows_total) if stream.rows_total else 0.0
