"""The routes of ``/api/v1/sync/records``: single records, lists, batches, histories and the change feed."""

import asyncio
from collections.abc import Iterator, Sequence
from functools import partial

import structlog
from aiohttp import web

from libs.core.text import number_of
from libs.process.read_budget import note_read
from libs.web import routes
from libs.web.answers import Answer, dump
from libs.web.calls import PROJECT_HEADER, Call
from libs.web.conditions import accepts_by_name
from libs.web.openapi import Content
from libs.web.requests import invalid_field
from services.record_sync.answers import (
    BatchShown,
    ChangesShown,
    RecordHistory,
    RecordShown,
    RecordsShown,
    change_view,
    event_view,
    record_view,
    result_view,
    stored_view,
)
from services.record_sync.domain.record import CreateRecord, DeleteRecord, UpdateRecord
from services.record_sync.feed import Changes, Feed, Interest
from services.record_sync.inputs import (
    POSITION_MAX,
    BatchOfOperations,
    ChangesQuery,
    CreateBody,
    ListQuery,
    OneRecordQuery,
    Operations,
    RecordHistoryQuery,
    UpdateBody,
    read_creation,
    read_operations,
    read_update,
)
from services.record_sync.queries import RecordQueries
from services.record_sync.records import RECORD_IDS, Records, require_developer

RECORDS = "/api/v1/sync/records"
STREAM_SECONDS_MAX = 60.0
SILENCE_SECONDS_MAX = 10.0
STREAMED_TOGETHER = 500
LISTENER_SECONDS_MAX = 20.0

log = structlog.get_logger(__name__)


class RecordRoutes:
    """The handlers of developer sync records."""

    def __init__(self, records: Records, queries: RecordQueries, feed: Feed) -> None:
        self._records = records
        self._queries = queries
        self._feed = feed

    def routes(self) -> Sequence[web.RouteDef]:
        one = f"{RECORDS}/{{id{RECORD_IDS.pattern}}}"
        project = {PROJECT_HEADER: "Which of your projects; optional for callers that have only one."}
        described = partial(
            routes.route,
            tag="Developer sync records",
            project_from="header",
            headers=project,
            path_shapes={"id": RECORD_IDS.shape},
        )
        get, post, patch, delete = (partial(described, method) for method in ("GET", "POST", "PATCH", "DELETE"))
        created = Content("Created", RecordShown, headers=("Location", "ETag"))
        stream = Content("The changes as Server-Sent Events", str, "text/event-stream")
        return [
            get(RECORDS, self.list, "List records"),
            post(
                RECORDS,
                self.create,
                "Create a record",
                body=CreateBody,
                reads=read_creation,
                status=201,
                answer=created,
                idempotent=True,
            ),
            post(
                f"{RECORDS}:batch",
                self.batch,
                "Write many records",
                body=BatchOfOperations,
                reads=read_operations,
                idempotent=True,
            ),
            get(
                f"{RECORDS}/changes",
                self.changes,
                "Follow the changes",
                headers={**project, "Last-Event-ID": "Where a stream goes on, in place of `after`."},
                answer=Content("The changes after a position", ChangesShown),
                also={200: stream},
            ),
            get(one, self.get, "Fetch a record", versioned=True),
            patch(
                one,
                self.update,
                "Change a record",
                body=UpdateBody,
                reads=read_update,
                versioned=True,
                conditional=True,
            ),
            delete(one, self.delete, "Delete a record", status=204, conditional=True),
            get(f"{one}/history", self.history, "The history of a record"),
        ]

    async def list(self, call: Call, query: ListQuery) -> RecordsShown:
        require_developer(call, query.developer_id)
        page = await self._queries.page(
            call.project_id,
            query.developer_id or call.caller.developer_id,
            query.resource_type,
            query.status,
            offset=(query.page - 1) * query.limit,
            limit=query.limit,
        )
        data = [stored_view(document["_id"], document["state"]) for document in page.documents]
        return {"total": page.total, "page": query.page, "limit": query.limit, "data": data}

    async def create(self, call: Call, body: CreateRecord) -> Answer[RecordShown]:
        created = await self._records.create(call, body)
        headers = {"Location": f"{RECORDS}/{created.id}"}
        return Answer(record_view(created), created.version, headers=headers)

    async def get(self, call: Call, query: OneRecordQuery) -> Answer[RecordShown]:
        record = await self._records.at(call, query.as_of)
        return Answer(record_view(record), record.version if query.as_of is None else None)

    async def update(self, call: Call, body: UpdateRecord) -> Answer[RecordShown]:
        changed = await self._records.change(call, body)
        return Answer(record_view(changed), changed.version)

    async def delete(self, call: Call) -> None:
        await self._records.change(call, DeleteRecord())

    async def history(self, call: Call, query: RecordHistoryQuery) -> RecordHistory:
        return {"data": [event_view(event) for event in await self._records.events(call, query)]}

    async def batch(self, call: Call, body: Operations) -> BatchShown:
        """Up to 1,000 operations, each answered by itself: the batch as a whole is not atomic."""
        results = await self._records.batch(call, [operation for operation, _ in body])
        statuses = (status for _, status in body)
        return {"results": [result_view(result, status) for result, status in zip(results, statuses, strict=True)]}

    async def changes(self, call: Call, query: ChangesQuery) -> web.StreamResponse | Answer[ChangesShown]:
        """The project's changes: one answer, at once or when there is one, or a stream of Server-Sent Events."""
        require_developer(call, query.developer_id)
        interest = Interest(call.project_id, query.developer_id or call.caller.developer_id, query.resource_type)
        is_stream = accepts_by_name(call.request.headers.get("Accept", ""), "text/event-stream")
        after = _last_event_id(call.request) if is_stream else None
        if after is None:
            after = await self._feed.latest() if query.after == "latest" else query.after
        await self._feed.require_known(after)
        if is_stream:
            return await self._stream(call.request, after, interest)
        found = await self._feed.await_changes(after, interest, query.limit, query.timeout)
        note_read(sum(len(envelope.data_json) for envelope in found.events))
        changes: ChangesShown = {
            "data": [change_view(envelope) for envelope in found.events],
            "cursor": found.cursor,
            "hasMore": not found.is_all,
        }
        return Answer(changes, headers={"Cache-Control": "no-store"})

    async def _stream(self, request: web.Request, after: int, interest: Interest) -> web.StreamResponse:
        """Server-Sent Events (WHATWG HTML, section 9.2) for a minute; then the client reconnects with its cursor.

        That bounds how long a revoked credential can go on reading.
        """
        headers = {"Content-Type": "text/event-stream", "Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        response = web.StreamResponse(headers=headers)
        await response.prepare(request)
        try:
            await self._write_changes(response, after, interest)
        except TimeoutError:
            log.warning("listener_closed", reason="it does not read", after=after)
            if request.transport is not None:
                request.transport.abort()
            raise ConnectionResetError("the listener does not read") from None
        return response

    async def _write_changes(self, response: web.StreamResponse, after: int, interest: Interest) -> None:
        """Raises ``TimeoutError`` when the listener takes nothing for ``LISTENER_SECONDS_MAX``."""
        await response.write(b"retry: 1000\n\n")
        loop = asyncio.get_running_loop()
        until = loop.time() + STREAM_SECONDS_MAX
        with self._feed.following():
            while (left_seconds := until - loop.time()) > 0 and not self._feed.is_closing:
                wait_seconds = min(left_seconds, SILENCE_SECONDS_MAX)
                found = await self._feed.await_changes(after, interest, STREAMED_TOGETHER, wait_seconds)
                after = found.cursor
                for frame in _frames(found):
                    async with asyncio.timeout(LISTENER_SECONDS_MAX):
                        await response.write(frame)
        async with asyncio.timeout(LISTENER_SECONDS_MAX):
            await response.write_eof()


def _frames(found: Changes) -> Iterator[bytes]:
    """Events with their positions as ids; at the end the cursor alone, which moves the client on without an event."""
    for item in found.events:
        yield b"id: %d\nevent: %s\ndata: %s\n\n" % (item.position, item.type.encode(), dump(change_view(item)))
    if not found.events or found.events[-1].position != found.cursor:
        yield b"id: %d\n\n" % found.cursor


def _last_event_id(request: web.Request) -> int | None:
    given = request.headers.get("Last-Event-ID")
    if not given:
        return None
    position = number_of(given)
    if position is None or position > POSITION_MAX:
        raise invalid_field("Last-Event-ID", "must be the id of an event of this feed")
    return position
