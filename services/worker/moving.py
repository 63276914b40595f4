"""Moves the streams of an attempt out of snapshots of the source.

What differs between the modes is the stream's plan: which rows the source's table has, and what the destination does
with them. A stream that has a state is read from it, and its new state is committed with the rows.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence, Set
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime

from libs.connectors.comparison import DestinationChangesRows, EndsDiffer
from libs.connectors.concurrency import all_of
from libs.connectors.protocol import (
    ConnectorRefused,
    ConnectorUnavailable,
    DestinationRun,
    Fenced,
    Snapshot,
    Source,
    StreamName,
    StreamPlan,
    Table,
    Written,
)
from libs.connectors.schema_changes import SchemaChange
from libs.connectors.states import StreamState
from libs.core.clock import duration_text
from libs.core.errors import RetryLater, first_error
from libs.core.schedule import next_tick
from services.worker.attempt import Attempt
from services.worker.failures import named
from services.worker.report import StreamReport
from services.worker.selection import Wanted, settings_of


@dataclass(frozen=True, slots=True)
class Prepared:
    """A stream that is ready to be moved.

    Args:
        state: what is committed with its rows.
        keys: the keys of all of the source's rows, if the others are to be deleted.
        changes: what the target's columns become.
    """

    stream: StreamReport
    table: Table
    state: StreamState | None
    keys: Table | None
    changes: tuple[SchemaChange, ...]


class Moving:
    """Moves the streams of one attempt. A stream that fails does not stop the others.

    Args:
        wanted: the streams' settings, by name.
        resets: streams whose state is ignored: all of their rows are read again.
        verifies: the run is to compare both ends: deleted rows are looked for whatever the schedule says, and a
            difference is no reason to try the run again.
        concurrent_streams: how many streams move at the same time.
        stall_timeout_seconds: how long a stream may move nothing while it is being moved.
    """

    def __init__(
        self,
        attempt: Attempt,
        source: Source,
        destination: DestinationRun,
        wanted: Mapping[StreamName, Wanted],
        *,
        resets: Set[StreamName] = frozenset(),
        verifies: bool = False,
        concurrent_streams: int = 1,
        stall_timeout_seconds: float,
    ) -> None:
        self._attempt = attempt
        self._report = attempt.report
        self._source = source
        self._destination = destination
        self._wanted = wanted
        self._resets = resets
        self._verifies = verifies
        self._concurrent_streams = concurrent_streams
        self._stall_timeout_seconds = stall_timeout_seconds

    async def move(self, streams: Sequence[StreamReport]) -> None:
        """Move those of the streams that have neither failed nor been committed by an earlier attempt."""
        waiting = [stream for stream in streams if not await self._is_settled(stream)]
        while waiting:
            async with self._source.snapshot() as snapshot:
                waiting = await self._move_from(snapshot, waiting)

    async def _is_settled(self, stream: StreamReport) -> bool:
        if stream.state == "failed":
            return True
        committed = await self._destination.committed(stream.plan)
        if committed is None:
            return False
        self._report.log("info", f"{stream.plan.stream}: {committed.rows:,} rows are already committed")
        self._completed(stream, committed)
        return True

    async def _move_from(self, snapshot: Snapshot, waiting: Sequence[StreamReport]) -> list[StreamReport]:
        """Move the streams; returns those that are left if a failure ended the snapshot."""
        ready: deque[Prepared] = deque()
        for place, stream in enumerate(waiting):
            try:
                ready.append(await self._prepare(stream, snapshot))
            except Exception as error:  # noqa: BLE001 - every kind of failure is the stream's
                await self._fail(stream, error)
                if not await snapshot.is_usable():
                    return [*(one.stream for one in ready), *waiting[place + 1 :]]
        await all_of(self._move_some(snapshot, ready) for _ in range(min(self._concurrent_streams, len(ready))))
        return [one.stream for one in ready]

    async def _move_some(self, snapshot: Snapshot, ready: "deque[Prepared]") -> None:
        """Move one stream after the other until none is left, or the snapshot can no longer be used."""
        while ready:
            prepared = ready.popleft()
            try:
                await self._move(prepared)
            except Exception as error:  # noqa: BLE001
                await self._fail(prepared.stream, error)
                if not await snapshot.is_usable():
                    return

    async def _prepare(self, stream: StreamReport, snapshot: Snapshot) -> Prepared:
        state = await self._state_of(stream.plan)
        table = await snapshot.table(stream.plan, None if state is None else state.position)
        for warning in table.warnings:
            self._report.log("warning", warning)
        found = await self._destination.prepare(table)
        for change in found.changes:
            self._report.log("info", f"{stream.plan.stream}: {change}; the destination follows")
        if found.left_out:
            names = ", ".join(sorted(found.left_out))
            self._report.log("info", f"{stream.plan.stream}: not moved, as schema_policy is ignore: {names}")
            table = table.without(found.left_out)
        stream.rows_total = table.rows_estimated
        now = self._report.clock.now()
        compared = found.exists and self._is_comparison_due(stream.plan, state, now)
        return Prepared(
            stream,
            table,
            _next_state(
                table, None if state is None else state.compared_at, now, all_known=compared or not found.exists
            ),
            table.keys() if compared else None,
            found.changes,
        )

    async def _state_of(self, plan: StreamPlan) -> StreamState | None:
        """The state to go on from; None to read all rows."""
        if plan.mode == "full_refresh":
            return None
        state = await self._destination.state(plan)
        if state is None:
            return None
        reason = None
        if plan.stream in self._resets:
            reason = "its state was reset"
        elif (state.mode, state.settings) != (plan.mode, settings_of(plan)):
            reason = "its settings have changed"
        if reason is None:
            return state
        self._report.log("info", f"{plan.stream}: all rows are read again: {reason}")
        return None

    def _is_comparison_due(self, plan: StreamPlan, state: StreamState | None, now: datetime) -> bool:
        """Whether rows are looked for that the source deleted."""
        if plan.deletes is None:
            return False
        schedule = "" if self._verifies else self._wanted[plan.stream].compare_keys
        if not schedule or state is None or state.compared_at is None:
            return True
        due = next_tick(schedule, state.compared_at)
        return due is not None and due <= now

    async def _move(self, prepared: Prepared) -> None:
        stream, table = prepared.stream, prepared.table
        self._report.log("info", f"{stream.plan.stream}: {_what_is_read(table)}")
        stream.begin()
        started_at = time.monotonic()
        try:
            async with _unless_stalled(stream, self._stall_timeout_seconds):
                written = await self._destination.write(table, stream, state=prepared.state, keys=prepared.keys)
        except (EndsDiffer, DestinationChangesRows) as error:
            differing = Written(0, verified=False, verification=error.document)
            self._report.results.append(stream.result(differing, time.monotonic() - started_at))
            raise
        finally:
            stream.loaded()
        seconds = time.monotonic() - started_at
        counts = counts_of(stream.plan, written)
        self._report.log("info", f"{stream.plan.stream}: {counts} in {duration_text(seconds)}{summary_of(written)}")
        if written.verification is not None and written.verified is None:
            reason = written.verification.get("reason")
            self._report.log("warning", f"{stream.plan.stream}: source and destination cannot be compared: {reason}")
        self._completed(stream, written, seconds, prepared)

    async def _fail(self, stream: StreamReport, error: Exception) -> None:
        """Record that a stream failed; raises if the whole attempt has to end.

        After a lost connection the destination is asked whether it has the commit. If it does not answer either, no
        other stream can be moved.
        """
        cause = first_error(error)
        if isinstance(cause, EndsDiffer) and self._verifies:
            cause = difference_found(cause)
        if isinstance(cause, Fenced):
            raise cause
        if isinstance(cause, RetryLater) and (committed := await self._destination.committed(stream.plan)) is not None:
            self._report.log("warning", f"{named(stream, cause.message)}; it was committed nevertheless")
            self._completed(stream, committed)
        else:
            self._attempt.fail(stream, cause)

    def _completed(
        self, stream: StreamReport, written: Written, seconds: float = 0.0, prepared: Prepared | None = None
    ) -> None:
        stream.complete(written.rows)
        changes = () if prepared is None else prepared.changes
        state = None if prepared is None else prepared.state
        self._report.results.append(stream.result(written, seconds, state, changes))


def difference_found(error: EndsDiffer) -> ConnectorRefused:
    """A difference that a run was to look for: it would be found again."""
    return ConnectorRefused(error.message, code=error.code)


def _next_state(table: Table, compared_at: datetime | None, now: datetime, *, all_known: bool) -> StreamState | None:
    """What is committed with the rows; ``all_known``: the target has no row that the source does not have."""
    if table.state is None:
        return None
    plan = table.plan
    return StreamState(
        mode=plan.mode,
        position=table.state,
        settings=settings_of(plan),
        compared_at=now if all_known else compared_at,
    )


def _what_is_read(table: Table) -> str:
    if not table.is_whole:
        return "reading what changed"
    return "reading" if table.rows_estimated is None else f"reading, about {table.rows_estimated:,} rows"


def counts_of(plan: StreamPlan, written: Written) -> str:
    """The numbers of rows in a stream's log line."""
    if plan.disposition != "merge":
        return f"{written.rows:,} rows"
    named = (("inserted", written.inserted), ("updated", written.updated), ("deleted", written.deleted))
    return f"{written.rows:,} rows read, " + ", ".join(f"{count:,} {name}" for name, count in named)


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
            f"{stream.plan.stream}: nothing has moved for {duration_text(seconds)}; {last} "
            f"({stream.bytes_read:,} bytes read)",
            code="stalled",
        ) from None
    finally:
        watching.cancel()


async def _watch(stream: StreamReport, seconds: float, limit: asyncio.Timeout) -> None:
    while (left_seconds := seconds - stream.still_seconds()) > 0:  # noqa: ASYNC110 - time itself is waited for
        await asyncio.sleep(left_seconds)
    limit.reschedule(asyncio.get_running_loop().time())
