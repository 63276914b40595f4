"""The change feed: every change of the project once, in order, without a gap, however it is read."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from structlog.testing import capture_logs

from libs.core.envelope import Envelope
from libs.eventsourcing.event_store import EventPage, EventStore
from tests.integration.record_sync.record_service import RECORDS, RecordService, running_record_service


async def read_all(service: RecordService, after: int = 0, limit: int = 7) -> tuple[list[Any], int]:
    """Everything after a position, chunk by chunk, and the cursor at the end."""
    found: list[Any] = []
    while True:
        chunk = (await service.request("GET", "/changes", after=after, limit=limit)).ok()
        found += chunk["data"]
        assert chunk["cursor"] >= after
        after = chunk["cursor"]
        if not chunk["hasMore"]:
            return found, after


@asynccontextmanager
async def stream(service: RecordService, headers: dict[str, str] | None = None, **query: Any) -> AsyncIterator[Any]:
    """The frames of the feed as Server-Sent Events: fields by name, those of comments and retries left out."""
    sent = {**service.headers(), "Accept": "text/event-stream", **(headers or {})}
    url = f"{service.base_url}{RECORDS}/changes"
    async with service.session.get(url, headers=sent, params=query) as response:
        assert response.status == 200
        assert response.headers["Content-Type"] == "text/event-stream"

        async def frames() -> AsyncIterator[dict[str, str]]:
            fields: dict[str, str] = {}
            async for line in response.content:
                text = line.decode().rstrip("\n")
                if text:
                    name, _, value = text.partition(": ")
                    fields[name] = value
                elif "id" in fields:
                    yield fields
                    fields = {}
                else:
                    fields = {}

        yield frames()


async def test_changes_tell_what_happened(service: RecordService) -> None:
    created = await service.create(data={"v": 1})
    await service.request("PATCH", f"/{created['id']}", {"status": "ERROR"})
    await service.request("DELETE", f"/{created['id']}")
    changes, _ = await read_all(service)
    assert [(item["type"], item["version"], item["changes"]) for item in changes] == [
        ("record_created", 1, {"status": "ACTIVE", "data": {"v": 1}, "metadata": {}}),
        ("record_updated", 2, {"status": "ERROR"}),
        ("record_deleted", 3, {}),
    ]
    assert {(item["recordId"], item["developerId"], item["resourceKey"]) for item in changes} == {
        (created["id"], "dev-1", "flag-1")
    }


async def test_the_feed_is_gap_free_under_concurrent_writers(mongod: str, database_prefix: str) -> None:
    """Readers that follow while two instances write see each project's events once, in order, and all of them."""
    async with (
        running_record_service(mongod, database_prefix) as first,
        running_record_service(mongod, database_prefix) as second,
    ):
        projects = [first.in_new_project() for _ in range(3)]
        done = asyncio.Event()
        written: dict[int, int] = dict.fromkeys((item.project for item in projects), 0)

        async def write(client: int) -> None:
            of_project = projects[client % 3]
            base_url = (first if client % 2 else second).base_url
            service = RecordService(base_url, of_project.context, of_project.session, of_project.project)
            for number in range(15):
                created = await service.create(f"{client}-{number}")
                await service.request("PATCH", f"/{created['id']}", {"data": {"n": number}})
                written[of_project.project] += 2

        async def follow(service: RecordService) -> list[Any]:
            found: list[Any] = []
            after = 0
            while True:
                was_done = done.is_set()
                limit = random.randint(1, 20)
                chunk = (await service.request("GET", "/changes", after=after, limit=limit, timeout=0.2)).ok()
                found += chunk["data"]
                after = chunk["cursor"]
                if was_done and not chunk["hasMore"]:
                    return found

        readers = [asyncio.create_task(follow(service)) for service in projects for _ in range(2)]
        async with asyncio.TaskGroup() as group:
            for client in range(18):
                group.create_task(write(client))
        done.set()
        for service, found in zip(
            [item for item in projects for _ in range(2)], await asyncio.gather(*readers), strict=True
        ):
            positions = [item["position"] for item in found]
            assert positions == sorted(set(positions))
            assert len(found) == written[service.project] == 6 * 15 * 2
        everything = [item for service in projects for item in (await read_all(service, limit=500))[0]]
        assert sorted(item["position"] for item in everything) == list(range(1, 18 * 15 * 2 + 1))


async def test_a_long_poll_answers_when_something_happens(service: RecordService) -> None:
    _, cursor = await read_all(service)
    polling = asyncio.create_task(service.request("GET", "/changes", after=cursor, timeout=30))
    other = service.in_new_project()
    await other.create()
    assert not polling.done()
    created = await service.create()
    async with asyncio.timeout(5):
        answer = (await polling).ok()
    assert [item["recordId"] for item in answer["data"]] == [created["id"]]


async def test_the_cursor_passes_over_what_others_wrote(service: RecordService) -> None:
    _, cursor = await read_all(service)
    other = service.in_new_project()
    for number in range(5):
        await other.create(str(number))
    found, later = await read_all(service, cursor)
    assert (found, later) == ([], cursor + 5)
    waited = (await service.request("GET", "/changes", after=later, timeout=0.05)).ok()
    assert waited == {"data": [], "cursor": later, "hasMore": False}


async def test_changes_can_be_narrowed_to_a_developer_and_a_type(service: RecordService) -> None:
    await service.create("1", developerId="d1", resourceType="A")
    await service.create("2", developerId="d1", resourceType="B")
    await service.create("3", developerId="d2", resourceType="B")
    found = (await service.request("GET", "/changes", developerId="d1", resourceType="B")).ok()["data"]
    assert [item["resourceKey"] for item in found] == ["2"]


async def test_a_stream_gives_each_change_once_and_goes_on_where_it_was(service: RecordService) -> None:
    first = await service.create("1", data={"text": "two\nlines"})
    async with asyncio.timeout(20), stream(service, after=0) as frames:
        seen = [frame async for frame in _events(frames, 1)]
        assert seen[0]["event"] == "record_created"
        assert first["id"] in seen[0]["data"]
        second = await service.create("2")
        seen += [frame async for frame in _events(frames, 1)]
        assert second["id"] in seen[1]["data"]
    third = await service.create("3")
    async with asyncio.timeout(20), stream(service, {"Last-Event-ID": seen[1]["id"]}, after=0) as frames:
        [last] = [frame async for frame in _events(frames, 1)]
        assert third["id"] in last["data"]


async def test_a_stream_from_the_latest_position_begins_with_what_comes(service: RecordService) -> None:
    await service.create("1")
    async with asyncio.timeout(20), stream(service, after="latest") as frames:
        created = await service.create("2")
        [seen] = [frame async for frame in _events(frames, 1)]
        assert created["id"] in seen["data"]


async def _events(frames: AsyncIterator[dict[str, str]], count: int) -> AsyncIterator[dict[str, str]]:
    """The next frames that carry an event, not only a cursor."""
    while count:
        frame = await anext(frames)
        if "data" in frame:
            yield frame
            count -= 1


async def test_an_open_stream_does_not_hold_up_the_end_of_the_service(mongod: str, database_prefix: str) -> None:
    url = f"{RECORDS}/changes"
    async with aiohttp.ClientSession() as session:
        async with running_record_service(mongod, database_prefix) as service:
            headers = {**service.headers(), "Accept": "text/event-stream"}
            response = await session.get(service.base_url + url, headers=headers)
            assert await response.content.readline() == b"retry: 1000\n"
            stopping = asyncio.get_running_loop().time()
        assert asyncio.get_running_loop().time() - stopping < 10
        rest = await response.read()
        assert rest.endswith(b"\n\n")


@pytest.mark.parametrize(
    ("query", "headers", "field"),
    [
        ({"after": -1}, {}, "after"),
        ({"after": "soon"}, {}, "after"),
        ({"after": 10**12}, {}, "after"),
        ({"timeout": 61}, {}, "timeout"),
        ({"limit": 1001}, {}, "limit"),
        ({}, {"Last-Event-ID": "x", "Accept": "text/event-stream"}, "Last-Event-ID"),
    ],
)
async def test_a_wrong_place_to_begin_is_400(
    service: RecordService, query: Any, headers: dict[str, str], field: str
) -> None:
    answer = await service.request("GET", "/changes", headers=headers, **query)
    assert answer.status == 400
    assert answer.fields[0].startswith(field)


async def test_numbers_travel_on_the_feed_as_they_were_sent(service: RecordService) -> None:
    text = '{"developerId": "d", "resourceType": "T", "resourceKey": "k", "data": {"price": 1.10}}'
    (await service.request("POST", text=text)).created()
    answer = await service.request("GET", "/changes", after=0)
    assert b'"data":{"price":1.10}' in answer.content


async def test_a_change_of_a_newer_version_is_left_to_its_instances(service: RecordService) -> None:
    """Passed over, its reader would never see it: the cursor moves on."""
    first, second = [await service.create(f"flag-{number}") for number in range(2)]
    events = service.context.store.database["events"]
    stream = {"stream": f"record-{second['id']}"}
    await events.update_one(stream, {"$set": {"type": "record_archived"}})
    chunk = (await service.request("GET", "/changes", after=0, limit=7)).ok()
    assert [item["recordId"] for item in chunk["data"]] == [first["id"]]
    refused = await service.request("GET", "/changes", after=chunk["cursor"])
    assert (refused.status, refused.body["code"]) == (503, "newer_version")
    await events.update_one(stream, {"$set": {"type": "record_created"}})
    chunk = (await service.request("GET", "/changes", after=chunk["cursor"])).ok()
    assert [item["recordId"] for item in chunk["data"]] == [second["id"]]


LARGE = {"text": "x" * 850_000}


async def test_a_chunk_of_large_changes_ends_early_and_none_is_left_out(service: RecordService) -> None:
    created = [(await service.create(str(number), data=LARGE))["id"] for number in range(12)]
    first = (await service.request("GET", "/changes", after=0, limit=500, resourceType="FEATURE_FLAG_STATE")).ok()
    assert 1 <= len(first["data"]) <= 5
    assert first["hasMore"]
    found, _ = await read_all(service, limit=500)
    assert [item["recordId"] for item in found] == created


async def test_a_few_changes_are_not_paid_for_with_hundreds(
    service: RecordService, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(12):
        await service.create(str(number), data=LARGE)
    pages: list[EventPage] = []
    read_after = EventStore.read_after

    async def counted(self: EventStore, position: int, limit: int) -> EventPage:
        pages.append(await read_after(self, position, limit))
        return pages[-1]

    monkeypatch.setattr(EventStore, "read_after", counted)
    _, cursor = await read_all(service, limit=1)
    pages.clear()
    await service.request("GET", "/changes", after=cursor - 12, limit=3)
    assert len(_events_of(pages)) <= 6


def _events_of(pages: list[EventPage]) -> list[Envelope]:
    return [event for page in pages for event in page.events]


async def test_all_who_wait_share_one_reader(service: RecordService, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = 0
    read_after = EventStore.read_after

    async def counted(self: EventStore, position: int, limit: int) -> EventPage:
        nonlocal reads
        reads += 1
        return await read_after(self, position, limit)

    await service.create("before")
    _, cursor = await read_all(service)
    monkeypatch.setattr(EventStore, "read_after", counted)
    other = service.in_new_project()
    polls = [
        asyncio.create_task(service.request("GET", "/changes", after=cursor, timeout=30, limit=100)) for _ in range(60)
    ]
    for number in range(10):
        await other.create(str(number))
    created = await service.create("after")
    async with asyncio.timeout(20):
        answers = [(await poll).ok() for poll in polls]
    assert {item["recordId"] for answer in answers for item in answer["data"]} == {created["id"]}
    # Each commit may wake the reader once or twice, and each follower may have caught up by itself once.
    assert reads < 60 + 11 * 3


async def test_a_listener_that_does_not_read_is_closed(service: RecordService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.record_sync.http.LISTENER_SECONDS_MAX", 0.3)
    host, port = service.base_url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port), limit=1024)
    head = f"GET {RECORDS}/changes?after=0 HTTP/1.1\r\nHost: x\r\nAccept: text/event-stream\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in service.headers().items())
    with capture_logs() as lines:
        writer.write(f"{head}\r\n".encode())
        for number in range(16):
            await service.create(str(number), data=LARGE)
        async with asyncio.timeout(20):
            while not any(line["event"] == "listener_closed" for line in lines):
                await asyncio.sleep(0.02)
    writer.close()


async def test_a_history_of_large_events_comes_in_parts(service: RecordService) -> None:
    record = await service.create(data=LARGE)
    for number in range(11):
        await service.request("PATCH", f"/{record['id']}", {"data": LARGE | {"number": number}})
    versions: list[int] = []
    before = 2**53
    while not versions or versions[-1] > 1:
        page = (await service.request("GET", f"/{record['id']}/history", before=before, limit=1000)).ok()["data"]
        assert 1 <= len(page) <= 6
        versions += [event["version"] for event in page]
        before = versions[-1]
    assert versions == list(range(12, 0, -1))


async def test_large_changes_that_wait_are_bounded_in_bytes(
    service: RecordService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused at once, safe to repeat, and what was taken is done."""
    monkeypatch.setattr("libs.eventsourcing.command_handler.WAITING_BYTES_MAX", 2_000_000)
    body = [{"developerId": "d", "resourceType": "T", "resourceKey": str(n), "data": LARGE} for n in range(24)]
    answers = await asyncio.gather(*(service.request("POST", body=item) for item in body))
    refused = [answer for answer in answers if answer.status == 503]
    assert refused
    assert all((answer.body["code"], answer.headers["Retry-After"]) == ("overloaded", "1") for answer in refused)
    assert (await service.list())["total"] == sum(answer.status == 201 for answer in answers) > 0
    monkeypatch.undo()
    again = await asyncio.gather(*(service.request("POST", body=item) for item in body))
    assert {answer.status for answer in again} <= {201, 409}


async def test_large_answers_at_once_are_bounded_in_bytes(
    service: RecordService, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(8):
        await service.create(str(number), data=LARGE)
    monkeypatch.setattr("libs.process.read_budget.BUDGET.size_bytes_max", 10_000_000)
    answers = await asyncio.gather(*(service.request("GET") for _ in range(8)))
    assert {answer.status for answer in answers} == {200, 503}
    async with asyncio.timeout(10):
        while (await service.request("GET")).status != 200:
            await asyncio.sleep(0.01)
