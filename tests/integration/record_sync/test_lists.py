"""Lists against a plain dictionary: totals, pages and filters after any sequence of writes, live and rebuilt.

Blocks of 2 numbers and eras of 6 make a dozen records cross all the borders that a million do.
"""

import asyncio
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from libs.eventsourcing import counted_lists
from libs.eventsourcing.rebuild import Rebuild, RebuildReport
from libs.testing.walks import examples
from services.record_sync.domain.record import RECORD
from services.record_sync.queries import INDEXES
from tests.integration.record_sync.record_service import RecordService, record_body, running_record_service

DEVELOPERS, TYPES, KEYS, STATUSES = ("d1", "d2"), ("T1", "T2"), ("k1", "k2", "k3"), ("ACTIVE", "ERROR")
FILTERS = list(itertools.product((None, *DEVELOPERS), (None, *TYPES), (None, *STATUSES)))
NAMES = ("developerId", "resourceType", "status")

Step = tuple[Any, ...]
CREATE = st.tuples(
    st.just("create"),
    st.sampled_from(DEVELOPERS),
    st.sampled_from(TYPES),
    st.sampled_from(KEYS),
    st.sampled_from(STATUSES),
)
PATCH = st.tuples(
    st.just("patch"),
    st.integers(0, 20),
    st.fixed_dictionaries(
        {}, optional={"data": st.just({"v": 2}), "status": st.sampled_from(STATUSES), "metadata": st.just({"m": 1})}
    ),
)
DELETE = st.tuples(st.just("delete"), st.integers(0, 20))
STEPS = st.lists(CREATE | CREATE | PATCH | DELETE, max_size=24)

BOUNDED = settings(
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@pytest.fixture(autouse=True, scope="module")
def small_blocks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(counted_lists, "BLOCK", 2)
        patch.setattr(counted_lists, "ERA", 6)
        yield


class Model:
    """What the API promises, as a dictionary in the order of creation."""

    def __init__(self, service: RecordService) -> None:
        self._service = service
        self.records: dict[str, Any] = {}
        self._all: list[str] = []

    async def take(self, step: Step) -> None:
        match step:
            case ("create", developer, kind, key, status):
                await self._create(record_body(key, developerId=developer, resourceType=kind, status=status))
            case ("patch", index, changes) if self._all:
                await self._patch(self._all[index % len(self._all)], changes)
            case ("delete", index) if self._all:
                await self._delete(self._all[index % len(self._all)])

    async def _create(self, body: Any) -> None:
        key = [body[name] for name in ("developerId", "resourceType", "resourceKey")]
        taken = any(
            [item[name] for name in ("developerId", "resourceType", "resourceKey")] == key
            for item in self.records.values()
        )
        answer = await self._service.request("POST", body=body)
        assert answer.status == (409 if taken else 201)
        if not taken:
            assert answer.body | body == answer.body
            self.records[answer.body["id"]] = answer.body
            self._all.append(answer.body["id"])

    async def _patch(self, identifier: str, changes: Any) -> None:
        answer = await self._service.request("PATCH", f"/{identifier}", changes)
        if identifier not in self.records:
            assert answer.status == 404
            return
        after = answer.ok()
        times = {name: after[name] for name in ("updatedAt", "lastSyncedAt")}
        assert after == self.records[identifier] | changes | times
        self.records[identifier] = after

    async def _delete(self, identifier: str) -> None:
        answer = await self._service.request("DELETE", f"/{identifier}")
        assert answer.status == (404 if self.records.pop(identifier, None) is None else 204)

    async def compare(self, limit: int) -> None:
        """Every list of the API, page by page, and one page beyond."""
        for values in FILTERS:
            query = {name: value for name, value in zip(NAMES, values, strict=True) if value is not None}
            wanted = [
                item
                for item in reversed(self.records.values())
                if all(item[name] == value for name, value in query.items())
            ]
            for page in range(1, len(wanted) // limit + 3):
                listed = await self._service.list(**query, limit=limit, page=page)
                assert listed["data"] == wanted[(page - 1) * limit : page * limit], (query, page)
                assert (listed["total"], listed["page"], listed["limit"]) == (len(wanted), page, limit)


async def rebuilt(service: RecordService, *, swap: bool) -> RebuildReport:
    context = service.context
    rebuild = Rebuild(context.store, context.event_log, aggregates=[RECORD], indexes=INDEXES)
    return await rebuild.run(swap=swap, grace_seconds=0)


@settings(BOUNDED, max_examples=examples(25))
@given(steps=STEPS, limit=st.integers(1, 5))
async def test_any_sequence_of_writes_agrees_with_a_dictionary(
    shared_service: RecordService, steps: list[Step], limit: int
) -> None:
    model = Model(shared_service.in_new_project())
    for step in steps:
        await model.take(step)
    await model.compare(limit)


@settings(BOUNDED, max_examples=examples(6))
@given(before=STEPS, after=STEPS)
async def test_replaying_the_events_gives_the_same_documents_and_counts(
    shared_service: RecordService, before: list[Step], after: list[Step]
) -> None:
    """Byte for byte, and the rebuilt ones serve on: numbers go on where they were."""
    model = Model(shared_service.in_new_project())
    for step in before:
        await model.take(step)
    report = await rebuilt(shared_service, swap=True)
    assert report.is_equal, report
    assert {item.name for item in report.collections} == {"records", "record_lists"}
    for step in after:
        await model.take(step)
    await model.compare(3)
    assert (await rebuilt(shared_service, swap=False)).is_equal


async def test_concurrent_writers_leave_exact_totals(mongod: str, database_prefix: str) -> None:
    """Two instances on one store, creating, changing and deleting at once; then a rebuild finds nothing to mend."""
    async with (
        running_record_service(mongod, database_prefix) as first,
        running_record_service(mongod, database_prefix) as second,
    ):
        second.project = first.project

        async def write(service: RecordService, client: int) -> None:
            for number in range(8):
                created = await service.create(f"{client}-{number}", developerId=f"d{client % 3}")
                if number % 2:
                    await service.request("PATCH", f"/{created['id']}", {"status": "ERROR"})
                if number % 4 == 3:
                    assert (await service.request("DELETE", f"/{created['id']}")).status == 204

        async with asyncio.TaskGroup() as group:
            for client in range(24):
                group.create_task(write(second if client % 2 else first, client))
        assert (await first.list())["total"] == 24 * 6
        assert (await second.list(status="ERROR"))["total"] == 24 * 2
        assert (await second.list(status="ACTIVE", developerId="d1"))["total"] == 8 * 4
        pages = [(await first.list(limit=7, page=page))["data"] for page in range(1, 22)]
        identifiers = [item["id"] for page in pages for item in page]
        assert len(identifiers) == len(set(identifiers)) == 24 * 6
        assert (await rebuilt(first, swap=False)).is_equal


async def test_a_rebuild_mends_counts_that_were_tampered_with(mongod: str, database_prefix: str) -> None:
    async with running_record_service(mongod, database_prefix) as service:
        for number in range(5):
            await service.create(str(number))
        counts = service.context.documents.collection("record_lists")
        await counts.update_many({"n": {"$gt": 0}}, {"$inc": {"n": 7}})
        assert (await service.list())["total"] > 5
        report = await rebuilt(service, swap=True)
        assert not report.is_equal
        assert (await service.list())["total"] == 5
        await service.create("next")
        assert [item["resourceKey"] for item in (await service.list(limit=2))["data"]] == ["next", "4"]


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ({"limit": 0}, "limit"),
        ({"limit": 101}, "limit"),
        ({"limit": "many"}, "limit"),
        ({"page": 0}, "page"),
        ({"page": -1}, "page"),
        ({"status": "active"}, "status"),
        ({"developerId": ""}, "developerId"),
        ({"developerID": "x"}, "developerID"),
    ],
)
async def test_a_wrong_query_is_400_and_named(shared_service: RecordService, query: Any, field: str) -> None:
    answer = await shared_service.request("GET", **query)
    assert (answer.status, answer.fields) == (400, [field])


async def test_an_empty_list_has_the_seeds_shape(shared_service: RecordService) -> None:
    listed = await shared_service.in_new_project().list()
    assert listed == {"total": 0, "page": 1, "limit": 50, "data": []}


async def test_names_with_separators_do_not_mix(shared_service: RecordService) -> None:
    """The names of lists are made of callers' texts; none of them can pass for another list."""
    service = shared_service.in_new_project()
    await service.create("1", developerId='x",null,null]#0000000')
    await service.create("2", developerId="x")
    await service.create("3", developerId="x$", resourceType="null")
    for developer in ('x",null,null]#0000000', "x", "x$"):
        assert (await service.list(developerId=developer))["total"] == 1
    assert (await service.list(resourceType="null"))["total"] == 1
    assert (await service.list(developerId="y"))["total"] == 0
