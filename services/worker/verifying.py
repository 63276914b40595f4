"""A run that compares both ends of each stream, and writes again what differs if it is told to.

Ends can be compared at a common position. A stream that is merged is first brought to the source's present one, as a
sync does, and compared in that commit. A table that is replaced is compared as the last run left it, so that rows which
the source has changed since count as differences.
"""

import time
from collections.abc import Mapping, Sequence

from libs.connectors.comparison import EndsDiffer, why_not_comparable
from libs.connectors.protocol import DestinationRun, Fenced, Source, StreamName, StreamPlan, Written
from libs.core.errors import first_error
from services.worker.attempt import Attempt
from services.worker.moving import Moving, difference_found
from services.worker.report import StreamReport
from services.worker.selection import Wanted


class Verifying:
    """Compares the streams of one attempt.

    Args:
        wanted: the streams' settings, by name.
        repair: write again what differs.
    """

    def __init__(
        self,
        attempt: Attempt,
        source: Source,
        destination: DestinationRun,
        wanted: Mapping[StreamName, Wanted],
        *,
        repair: bool,
        stall_timeout_seconds: float,
    ) -> None:
        self._attempt = attempt
        self._report = attempt.report
        self._source = source
        self._destination = destination
        self._wanted = wanted
        self._repair = repair
        self._stall_timeout_seconds = stall_timeout_seconds

    async def verify(self) -> None:
        streams = [stream for stream in self._report.streams if stream.state != "failed"]
        merged = [stream for stream in streams if stream.plan.disposition == "merge" and stream.plan.deletes == "hard"]
        others = [stream for stream in streams if stream not in merged]
        if self._repair:
            # All rows are read, and only those that differ are written; then the ends are compared.
            await self._move(merged, resets=frozenset(stream.plan.stream for stream in merged))
        else:
            await self._move(merged)
        await self._move([stream for stream in others if await self._differs(stream)])

    async def _move(self, streams: Sequence[StreamReport], resets: frozenset[StreamName] = frozenset()) -> None:
        moving = Moving(
            self._attempt,
            self._source,
            self._destination,
            self._wanted,
            resets=resets,
            verifies=True,
            stall_timeout_seconds=self._stall_timeout_seconds,
        )
        await moving.move(streams)

    async def _differs(self, stream: StreamReport) -> bool:
        """Whether the stream has to be written again; records what was found otherwise."""
        reason = _why_not(stream.plan)
        if reason is not None:
            self._found(stream, Written(0, verification={"comparable": False, "reason": reason}), 0.0)
            return False
        stream.begin()
        stream.loaded()
        started_at = time.monotonic()
        try:
            async with self._source.snapshot() as snapshot:
                comparison = await self._destination.compare(await snapshot.table(stream.plan))
        except Exception as error:  # noqa: BLE001 - every kind of failure is the stream's
            return self._is_difference(stream, first_error(error), time.monotonic() - started_at)
        rows = comparison.document.get("rows", 0)
        unchanged = Written(rows, unchanged=rows, verified=comparison.verified, verification=comparison.document)
        self._found(stream, unchanged, time.monotonic() - started_at)
        return False

    def _is_difference(self, stream: StreamReport, cause: BaseException, seconds: float) -> bool:
        if isinstance(cause, Fenced):
            raise cause
        if not isinstance(cause, EndsDiffer):
            self._attempt.fail(stream, cause)
            return False
        if self._repair:
            self._report.log("warning", f"{cause.message}; the rows are written again")
            return True
        self._report.results.append(stream.result(Written(0, verified=False, verification=cause.document), seconds))
        self._attempt.fail(stream, difference_found(cause))
        return False

    def _found(self, stream: StreamReport, written: Written, seconds: float) -> None:
        name = stream.plan.stream
        if written.verified:
            self._report.log("info", f"{name}: source and destination are equal, {written.rows:,} rows")
        else:
            reason = (written.verification or {}).get("reason")
            self._report.log("warning", f"{name}: source and destination cannot be compared: {reason}")
        stream.complete(written.rows)
        self._report.results.append(stream.result(written, seconds))


def _why_not(plan: StreamPlan) -> str | None:
    if plan.disposition == "merge" and plan.deletes is None:
        return "the stream has no deletes, so that rows which the source deleted stay"
    return why_not_comparable(plan, is_complete=True)
