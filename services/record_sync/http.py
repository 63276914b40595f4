"""The routes of ``/api/v1/sync/records``: single records, lists, batches, histories and the change feed."""

import asyncio
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated

import structlog
from aiohttp import web
from pydantic import Field

from libs.core.errors import FieldError, Forbidden, InvalidInput
from libs.core.text import number_of
from libs.eventsourcing.command_handler import Entity, IdempotencyKey
from libs.process.read_budget import note_read
from libs.web.answers import dump, json_answer
from libs.web.conditions import accepts_by_name, if_match_of
from libs.web.openapi import Content, describe
from libs.web.requests import idempotency_of, metadata_of, principal_of, read_query
from services.record_sync.answers import RECORD_ID, BatchShown, ChangesShown, RecordHistory, RecordShown, RecordsShown
from services.record_sync.domain.record import CreateRecord, DeleteRecord, Record
from services.record_sync.feed import Changes, Feed, Interest
from services.record_sync.inputs import (
    POSITION_MAX,
    BatchOfOperations,
    ChangesQuery,
    CreateBody,
    HistoryQuery,
    ListQuery,
    OneQuery,
    Operation,
    UpdateBody,
    read_creation,
    read_operations,
    read_update,
)
from services.record_sync.queries import RecordQueries
from services.record_sync.records import Caller, Records
from services.record_sync.views import change_view, record_view, result_view, stored_view

RECORDS = "/api/v1/sync/records"
PROJECT_HEADER = "X-Project-Id"
RecordId = Annotated[str, Field(min_length=1, examples=[RECORD_ID])]
STREAM_SECONDS_MAX = 60.0
SILENCE_SECONDS_MAX = 10.0
STREAMED_TOGETHER = 500
LISTENER_SECONDS_MAX = 20.0

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class RecordRoutes:
    """The handlers of developer sync records."""

    records: Records
    queries: RecordQueries
    feed: Feed

    def routes(self) -> Sequence[web.RouteDef]:
        one = f"{RECORDS}/{{id:(?!changes(?:/|$))[^/]+}}"
        project = {PROJECT_HEADER: "Which of your projects; may be left out by who has only one."}
        described = partial(describe, tag="Developer sync records", path={"id": RecordId}, headers=project)
        created = Content("Created", RecordShown, headers=("Location", "ETag"))
        stream = Content("The changes as Server-Sent Events", str, "text/event-stream")
        return [
            described(web.get(RECORDS, self.list), "List records", query=ListQuery, answer=RecordsShown),
            described(
                web.post(RECORDS, self.create),
                "Create a record",
                body=CreateBody,
                status=201,
                answer=created,
                idempotent=True,
            ),
            described(
                web.post(f"{RECORDS}:batch", self.batch),
                "Write many records",
                body=BatchOfOperations,
                answer=BatchShown,
                idempotent=True,
            ),
            described(
                web.get(f"{RECORDS}/changes", self.changes),
                "Follow the changes",
                query=ChangesQuery,
                headers={**project, "Last-Event-ID": "Where a stream goes on, in place of `after`."},
                answer=Content("The changes after a position", ChangesShown),
                also={200: stream},
            ),
            described(web.get(one, self.get), "Fetch a record", query=OneQuery, answer=RecordShown, versioned=True),
            described(
                web.patch(one, self.update),
                "Change a record",
                body=UpdateBody,
                answer=RecordShown,
                versioned=True,
                conditional=True,
            ),
            described(web.delete(one, self.delete), "Delete a record", status=204, conditional=True),
            described(
                web.get(f"{one}/history", self.history),
                "The history of a record",
                query=HistoryQuery,
                answer=RecordHistory,
            ),
        ]

    async def list(self, request: web.Request) -> web.StreamResponse:
        caller = _reader(request)
        query = read_query(request, ListQuery)
        caller.require_developer(query.developer_id)
        page = await self.queries.page(
            caller.project_id,
            query.developer_id or caller.developer_id,
            query.resource_type,
            query.status,
            offset=(query.page - 1) * query.limit,
            limit=query.limit,
        )
        data = [stored_view(document["_id"], document["state"]) for document in page.documents]
        return json_answer({"total": page.total, "page": query.page, "limit": query.limit, "data": data})

    async def create(self, request: web.Request) -> web.StreamResponse:
        caller = _writer(request)
        command = await read_creation(request)
        created = await self.records.create(caller, command, _idempotency(request, caller))
        answer = _shown(created, 201)
        answer.headers["Location"] = f"{RECORDS}/{created.id}"
        return answer

    async def get(self, request: web.Request) -> web.StreamResponse:
        caller = _reader(request)
        query = read_query(request, OneQuery)
        record_id = request.match_info["id"]
        if query.as_of is None:
            return _shown(await self.records.require(caller, record_id))
        entity = await self.records.require(caller, record_id, deleted_too=True)
        then = await self.queries.as_of(entity.id, query.as_of)
        return json_answer(record_view(then))

    async def update(self, request: web.Request) -> web.StreamResponse:
        caller = _writer(request)
        command = await read_update(request)
        return _shown(await self.records.update(caller, request.match_info["id"], command, if_match_of(request)))

    async def delete(self, request: web.Request) -> web.StreamResponse:
        caller = _writer(request)
        await self.records.delete(caller, request.match_info["id"], if_match_of(request))
        return web.Response(status=204)

    async def history(self, request: web.Request) -> web.StreamResponse:
        caller = _reader(request)
        query = read_query(request, HistoryQuery)
        entity = await self.records.require(caller, request.match_info["id"], deleted_too=True)
        events = await self.queries.history(entity.id, before_version=query.before, limit=query.limit)
        return json_answer({"data": events})

    async def batch(self, request: web.Request) -> web.StreamResponse:
        """Up to 1,000 operations, each answered by itself: the batch as a whole is not atomic."""
        caller = _writer(request)
        operations = await read_operations(request)
        results = await self.records.batch(caller, operations, _idempotency(request, caller))
        shown = [
            result_view(result, _success_of(operation)) for operation, result in zip(operations, results, strict=True)
        ]
        return json_answer({"results": shown})

    async def changes(self, request: web.Request) -> web.StreamResponse:
        """The project's changes: one answer, at once or when there is one, or a stream of Server-Sent Events."""
        caller = _reader(request)
        query = read_query(request, ChangesQuery)
        caller.require_developer(query.developer_id)
        interest = Interest(caller.project_id, query.developer_id or caller.developer_id, query.resource_type)
        is_stream = accepts_by_name(request.headers.get("Accept", ""), "text/event-stream")
        after = _last_event_id(request) if is_stream else None
        if after is None:
            after = await self.feed.latest() if query.after == "latest" else query.after
        await self.feed.require_known(after)
        if is_stream:
            return await self._stream(request, after, interest)
        found = await self.feed.await_changes(after, interest, query.limit, query.timeout)
        note_read(sum(len(envelope.data_json) for envelope in found.events))
        data = [change_view(envelope) for envelope in found.events]
        answer = json_answer({"data": data, "cursor": found.cursor, "hasMore": not found.is_all})
        answer.headers["Cache-Control"] = "no-store"
        return answer

    async def _stream(self, request: web.Request, after: int, interest: Interest) -> web.StreamResponse:
        """Server-Sent Events (WHATWG HTML, section 9.2) for a minute; then the reader comes back with its cursor.

        That bounds how long a credential that was revoked meanwhile can go on reading.
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
        with self.feed.following():
            while (left_seconds := until - loop.time()) > 0 and not self.feed.is_closing:
                wait_seconds = min(left_seconds, SILENCE_SECONDS_MAX)
                found = await self.feed.await_changes(after, interest, STREAMED_TOGETHER, wait_seconds)
                after = found.cursor
                for frame in _frames(found):
                    async with asyncio.timeout(LISTENER_SECONDS_MAX):
                        await response.write(frame)
        async with asyncio.timeout(LISTENER_SECONDS_MAX):
            await response.write_eof()


def _frames(found: Changes) -> Iterator[bytes]:
    """Events with their positions as ids; at the end the cursor alone, which moves the reader on without an event."""
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
        message = "must be the id of an event of this feed"
        raise InvalidInput(f"Last-Event-ID {message}", errors=[FieldError("Last-Event-ID", message)])
    return position


def _shown(entity: Entity[Record], status: int = 200) -> web.Response:
    return json_answer(record_view(entity), status, entity.version)


def _success_of(operation: Operation | InvalidInput) -> int:
    match operation:
        case Operation(command=CreateRecord()):
            return 201
        case Operation(command=DeleteRecord()):
            return 204
        case _:
            return 200


def _reader(request: web.Request) -> Caller:
    return _caller(request, "sync:read")


def _writer(request: web.Request) -> Caller:
    return _caller(request, "sync:write")


def _idempotency(request: web.Request, caller: Caller) -> IdempotencyKey | None:
    """The request's Idempotency-Key; what its path does not say, the project, makes another request of it."""
    key = idempotency_of(request)
    if key is None:
        return None
    return replace(key, id=hashlib.sha256(f"{key.id}/{caller.project_id}".encode()).hexdigest())


def _caller(request: web.Request, scope: str) -> Caller:
    """Who calls for which project: the credential's only one, or that of the header ``X-Project-Id``.

    Raises:
        Forbidden: the scope is missing, or the caller is no member of the project.
        InvalidInput: the caller has several projects and names none.
    """
    principal = principal_of(request)
    principal.require_scope(scope)
    named = request.headers.get(PROJECT_HEADER)
    if named is None and len(principal.projects) == 1:
        [project_id] = principal.projects
    elif named is None and not principal.projects:
        raise Forbidden("you are not a member of any project", code="not_a_member")
    elif named is not None and (number := number_of(named)) is not None:
        project_id = number
    else:
        message = "must name one of your projects by its number"
        raise InvalidInput(f"{PROJECT_HEADER} {message}", errors=[FieldError(PROJECT_HEADER, message)])
    principal.require_project(project_id)
    return Caller(project_id, principal.developer_id, replace(metadata_of(request), project_id=project_id))
