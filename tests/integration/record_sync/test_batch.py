"""Batches: each operation is answered by itself, in the order in which they were sent."""

from typing import Any

import pytest

from tests.integration.record_sync.record_service import RecordService, record_body


async def perform(service: RecordService, *operations: Any, **more: Any) -> list[Any]:
    answer = await service.request("POST", ":batch", {"operations": list(operations)}, **more)
    results: list[Any] = answer.ok()["results"]
    assert len(results) == len(operations)
    return results


def create(key: str, **changes: Any) -> Any:
    return {"op": "create", "record": record_body(key, **changes)}


async def test_each_operation_is_answered_by_itself(service: RecordService) -> None:
    known = await service.create("known")
    foreign = await service.in_new_project().create()
    results = await perform(
        service,
        create("new"),
        create("known"),
        {"op": "create", "record": {"developerId": "d"}},
        {"op": "update", "id": known["id"], "changes": {"status": "ERROR"}},
        {"op": "update", "id": known["id"], "changes": {"data": {}}, "ifMatch": 1},
        {"op": "update", "id": known["id"], "changes": {"resourceKey": "other"}},
        {"op": "delete", "id": foreign["id"]},
        {"op": "delete", "id": "nothing"},
        {"op": "delete", "id": known["id"], "ifMatch": 2},
        {"op": "replace"},
    )
    assert [item["status"] for item in results] == [201, 409, 400, 200, 412, 400, 403, 404, 204, 400]
    assert results[0]["record"]["resourceKey"] == "new"
    assert results[3]["record"] | {"status": "ACTIVE"} == known | {
        name: results[3]["record"][name] for name in ("updatedAt", "lastSyncedAt")
    }
    assert [item["field"] for item in results[2]["error"]["errors"]] == [
        "record.resourceType",
        "record.resourceKey",
        "record.data",
    ]
    assert results[5]["error"]["errors"][0]["field"] == "changes.resourceKey"
    assert [item["resourceKey"] for item in (await service.list())["data"]] == ["new"]


async def test_a_thousand_records_in_one_call_keep_their_order_and_numbers(service: RecordService) -> None:
    head = '{"op": "create", "record": {"developerId": "d", "resourceType": "T", "data": {"p": 1.10}, "resourceKey": '
    operations = ",".join(f'{head}"{number}"}}}}' for number in range(1000))
    answer = await service.request("POST", ":batch", text=f'{{"operations": [{operations}]}}')
    assert {item["status"] for item in answer.ok()["results"]} == {201}
    assert answer.content.count(b'"data":{"p":1.10}') == 1000
    listed = await service.list(limit=100, page=3)
    assert listed["total"] == 1000
    assert [item["resourceKey"] for item in listed["data"]] == [str(number) for number in range(799, 699, -1)]
    assert sorted(listed["data"], key=lambda item: (item["createdAt"], item["id"]), reverse=True) == listed["data"]


async def test_a_key_that_is_freed_can_be_taken_in_the_same_batch(service: RecordService) -> None:
    old = await service.create("k")
    results = await perform(service, {"op": "delete", "id": old["id"]}, create("k"))
    assert [item["status"] for item in results] == [204, 201]


async def test_a_repeated_batch_repeats_nothing_that_was_done(service: RecordService) -> None:
    old = await service.create("old")
    key = {"Idempotency-Key": f"batch-{service.project}"}
    operations = [create("a"), create("old"), {"op": "delete", "id": old["id"]}]
    first = await perform(service, *operations, headers=key)
    assert [item["status"] for item in first] == [201, 409, 204]
    again = await perform(service, *operations, headers=key)
    assert (again[0], again[2]) == (first[0], first[2])
    # What was refused is tried again, and by now its key is free.
    assert again[1]["status"] == 201
    other = await service.request("POST", ":batch", {"operations": [create("b")]}, headers=key)
    assert other.status == 422


@pytest.mark.parametrize("body", [{}, {"operations": []}, {"operations": [{}] * 1001}, {"operations": {}}, []])
async def test_a_body_that_is_no_batch_is_400(service: RecordService, body: Any) -> None:
    assert (await service.request("POST", ":batch", body)).status == 400


def nested(levels: int) -> str:
    return '{"a":' * levels + "1" + "}" * levels


@pytest.mark.parametrize(
    "bad",
    [
        '{"op": "delete", "id": "a", "id": "b"}',
        '{"op": "delete", "id": "a\\u0000"}',
        '{"op": "update", "id": "a", "changes": {"data": {"n": 9223372036854775808}}}',
        '{"op": "update", "id": "a", "changes": {"data": {"n": ' + "9" * 5000 + "}}}",
        '{"op": "update", "id": "a", "changes": {"data": ' + nested(500) + "}}",
        '{"op": "update", "id": "a", "changes": {"data": ' + nested(1_100) + "}}",
        "[" * 100_000 + "]" * 100_000,
        '{"op": "delete", "id": "\\ud800"}',
        '{"op": "delete", "\\ud800": "a"}',
        '{"op": "create", "record": {"data": {"a": "\\udc00\\ud800"}}}',
        '{"op": "delete", "id": "a", "ifMatch": "1"}',
        "[]",
        "null",
        '"delete"',
    ],
)
async def test_an_operation_that_is_wrong_refuses_itself_alone(service: RecordService, bad: str) -> None:
    good = '{"op": "create", "record": {"developerId": "d", "resourceType": "T", "data": {}, "resourceKey": "k"}}'
    answer = await service.request("POST", ":batch", text=f'{{"operations": [{bad}, {good}]}}')
    assert [item["status"] for item in answer.ok()["results"]] == [400, 201]


@pytest.mark.parametrize(
    "text",
    [
        '{"operations": [{"op": "delete", "id": "a}]}',
        '{"operations": [{"op": "delete", "id": "a"},]}',
        '{"operations": [,{"op": "delete", "id": "a"}]}',
        '{"operations": [{"op": "delete", "id": "a"} {"op": "delete", "id": "b"}]}',
        '{"operations": [{"op": "delete", "id": "a"]}]}',
        '{"operations": [{"op": "delete", "id": "a"}]',
        '{"operations": [{"op": "delete", "id": "a"}]}}',
        '{"operations": [{"op": "delete", "id": "a"}}]',
        '{"operations": [{"op": "delete", "id": "a"}], "operations": []}',
        '{"operations" [{"op": "delete", "id": "a"}]}',
        '{operations: [{"op": "delete", "id": "a"}]}',
        '{"operations": [{"op": "delete", "id": NaN}]}',
        '{"operations": [{"op": "delete", "id": "a"}, {"op": "\\x"}]}',
        '{"operations": [{"op": "delete", "id": "a"}], }',
        '{"operations": [{"op": "delete", "id": "a"}], "more": 1}',
        "",
        "]",
        "[" * 500_000,
    ],
)
async def test_what_is_no_json_is_refused_as_a_whole(service: RecordService, text: str) -> None:
    assert (await service.request("POST", ":batch", text=text)).status == 400


async def test_what_an_operation_holds_may_nest_as_deeply_as_it_may_alone(service: RecordService) -> None:
    """The body of a single call is one level, its data the next 63."""
    for levels, status in ((63, 201), (64, 400)):
        record = f'{{"developerId": "d", "resourceType": "T", "resourceKey": "k%s", "data": {nested(levels)}}}'
        assert (await service.request("POST", "", text=record % "1")).status == status
        operation = f'{{"op": "create", "record": {record % "2"}}}'
        answer = await service.request("POST", ":batch", text=f'{{"operations": [{operation}]}}')
        assert [item["status"] for item in answer.ok()["results"]] == [status]


@pytest.mark.parametrize("text", ['{"operations": [], "operations": []}', '{"operations": {}}', "[]", "{", "", "1"])
async def test_a_frame_that_is_wrong_refuses_the_batch(service: RecordService, text: str) -> None:
    assert (await service.request("POST", ":batch", text=text)).status == 400


@pytest.mark.parametrize(
    ("moment", "status"),
    [
        ("0001-01-01T00:00:00Z", 404),
        ("9999-12-31T23:59:59.999999Z", 200),
        ("0001-01-01T00:00:00%2B14:00", 400),
        ("9999-12-31T23:59:59-14:00", 400),
        ("1700000000", 400),
        ("2026", 400),
        ("2026-01-01", 400),
        ("٢٠٢٦-01-01T00:00:00Z", 400),
    ],
)
async def test_a_moment_of_the_past_may_lie_anywhere_in_time(service: RecordService, moment: str, status: int) -> None:
    created = await service.create()
    assert (await service.request("GET", f"/{created['id']}?as_of={moment}")).status == status


@pytest.mark.parametrize("number", ["1_0", "%2B1", "%201", "1.0", "١", "0x1", "1e1", ""])
@pytest.mark.parametrize("parameter", ["limit", "page"])
async def test_a_number_is_written_in_digits(service: RecordService, parameter: str, number: str) -> None:
    assert (await service.request("GET", f"?{parameter}={number}")).status == 400
