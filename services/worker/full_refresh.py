"""The mode ``full_refresh``: each stream's target is replaced with the rows of one snapshot of the source."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from libs.connectors.comparison import DestinationChangesRows, EndsDiffer
from libs.connectors.protocol import ConnectorUnavailable, DestinationRun, Fenced, Snapshot, Source, Table, Written
from libs.core.errors import RetryLater, first_error
from services.worker.attempt import Attempt
from services.worker.failures import named
from services.worker.report import StreamReport


class FullRefresh:
    """Moves the streams of one attempt. A stream that fails does not stop the others.

    Args:
        stall_timeout_seconds: how long a stream may move nothing while it is being moved.
    """

    def __init__(
        self, attempt: Attempt, source: Source, destination: DestinationRun, stall_timeout_seconds: float
    ) -> None:
        self._attempt = attempt
        self._report = attempt.report
        self._source = source
        self._destination = destination
        self._stall_timeout_seconds = stall_timeout_seconds

    async def move(self) -> None:
        """Move every stream that has neither failed nor been committed by an earlier attempt."""
        waiting = [stream for stream in self._report.streams if not await self._is_settled(stream)]
        while waiting:
            async with self._source.snapshot() as snapshot:
                waiting = await self._move_from(snapshot, waiting)

    async def _is_settled(self, stream: StreamReport) -> bool:
        if stream.state == "failed":
            return True
        committed = await self._destination.committed(stream.plan)
        if committed is None:
            return False
        self._report.log("info", f"{stream.plan.stream}: {committed.rows} rows are already committed")
        self._completed(stream, committed)
        return True

    async def _move_from(self, snapshot: Snapshot, waiting: Sequence[StreamReport]) -> list[StreamReport]:
        """Move the streams; returns those that are left if a failure ended the snapshot."""
        ready: list[tuple[StreamReport, Table]] = []
        for place, stream in enumerate(waiting):
            try:
                ready.append((stream, await self._prepare(stream, snapshot)))
            except Exception as error:  # noqa: BLE001 - every kind of failure is the stream's
                await self._fail(stream, error)
                if not await snapshot.is_usable():
                    return [*(one for one, _ in ready), *waiting[place + 1 :]]
        for place, (stream, table) in enumerate(ready):
            try:
                await self._move(stream, table)
            except Exception as error:  # noqa: BLE001
                await self._fail(stream, error)
                if not await snapshot.is_usable():
                    return [one for one, _ in ready[place + 1 :]]
        return []

    async def _prepare(self, stream: StreamReport, snapshot: Snapshot) -> Table:
        table = await snapshot.table(stream.plan)
        for warning in table.warnings:
            self._report.log("warning", warning)
        await self._destination.prepare(table)
        stream.rows_total = table.rows_estimated
        return table

    async def _move(self, stream: StreamReport, table: Table) -> None:
        estimate = "" if table.rows_estimated is None else f", about {table.rows_estimated} rows"
        self._report.log("info", f"{stream.plan.stream}: reading{estimate}")
        stream.begin()
        started_at = time.monotonic()
        try:
            async with _unless_stalled(stream, self._stall_timeout_seconds):
                written = await self._destination.write(table, stream)
        except (EndsDiffer, DestinationChangesRows) as error:
            differing = Written(0, False, error.document)
            self._report.results.append(stream.result(differing, time.monotonic() - started_at))
            raise
        finally:
            stream.loaded()
        seconds = time.monotonic() - started_at
        self._report.log("info", f"{stream.plan.stream}: {written.rows} rows in {seconds:.2f} s{summary_of(written)}")
        if written.verification is not None and written.verified is None:
            reason = written.verification.get("reason")
            self._report.log("warning", f"{stream.plan.stream}: source and destination cannot be compared: {reason}")
        self._completed(stream, written, seconds)

    async def _fail(self, stream: StreamReport, error: Exception) -> None:
        """Record that a stream failed; raises if the whole attempt has to end.

        After a lost connection the destination is asked whether it has the commit. If it does not answer either, no
        other stream can be moved.
        """
        cause = first_error(error)
        if isinstance(cause, Fenced):
            raise cause
        if isinstance(cause, RetryLater) and (committed := await self._destination.committed(stream.plan)) is not None:
            self._report.log("warning", f"{named(stream, cause.message)}; it was committed nevertheless")
            self._completed(stream, committed)
        else:
            self._attempt.fail(stream, cause)

    def _completed(self, stream: StreamReport, written: Written, seconds: float = 0.0) -> None:
        stream.complete(written.rows)
        self._report.results.append(stream.result(written, seconds))


def summary_of(written: Written) -> str:
    """What a stream's log line adds to the number of rows: the comparison, and the values that a policy changed."""
    if not written.values_changed:
        return ", source and destination are equal" if written.verified else ""
    by_column = ", ".join(f"{column}: {values}" for column, values in written.values_changed.items())
    count = sum(written.values_changed.values())
    changed = f"{count} {'value' if count == 1 else 'values'} that a policy changed ({by_column})"
    return f", source and destination are equal except for {changed}" if written.verified else f", with {changed}"


@asynccontextmanager
async def _unless_stalled(stream: StreamReport, seconds: float) -> AsyncIterator[None]:
    """Raises ``ConnectorUnavailable`` as soon as the stream has not moved for that long."""
    limit = asyncio.timeout(None)
    watching = asyncio.create_task(_watch(stream, seconds, limit))
    try:
        async with limit:
            yield
    except TimeoutError:
        if not limit.expired():
            raise
        last = f"the {stream.moved_last} moved last" if stream.moved_last else "the source has sent nothing yet"
        raise ConnectorUnavailable(
            f"{stream.plan.stream}: nothing has moved for {seconds:g} s; {last} ({stream.bytes_read} bytes read)",
            code="stalled",
        ) from None
    finally:
        watching.cancel()


async def _watch(stream: StreamReport, seconds: float, limit: asyncio.Timeout) -> None:
    while (left_seconds := seconds - stream.still_seconds()) > 0:  # noqa: ASYNC110 - time itself is waited for
        await asyncio.sleep(left_seconds)
    limit.reschedule(asyncio.get_running_loop().time())
