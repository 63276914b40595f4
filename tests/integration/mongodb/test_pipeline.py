"""Commands to MongoDB that are sent before the former's answer came, and transactions that fence their predecessors."""

import uuid
from collections.abc import Iterator
from typing import Any

import pymongo
import pytest

from libs.mongodb.client import Document, OperationFailure
from libs.mongodb.pipeline import (
    Pipeline,
    StatementRefused,
    Transactions,
    find,
    removal,
    replacement,
    update,
    write_commands,
)


@pytest.fixture
def database(mongod: str, database_prefix: str) -> Iterator[pymongo.database.Database[Document]]:
    with pymongo.MongoClient[dict[str, Any]](mongod, w="majority") as client:
        database = client[f"{database_prefix}pipeline"]
        database.create_collection("things")
        yield database


@pytest.fixture
def pipeline(database: pymongo.database.Database[Document]) -> Pipeline:
    return Pipeline(database.client, database.name)


def inserting(*identifiers: Any) -> Document:
    return {"insert": "things", "documents": [{"_id": identifier} for identifier in identifiers]}


def stored(database: pymongo.database.Database[Document]) -> list[Any]:
    return sorted(document["_id"] for document in database["things"].find())


def test_commands_are_executed_and_answered_in_order(pipeline: Pipeline) -> None:
    bump = write_commands("things", [update({"_id": 1}, {"$inc": {"n": 1}}, upsert=True)])[0]
    replies = pipeline.send([inserting(1), bump, find("things", {}), bump, find("things", {})])
    assert [replies[index]["cursor"]["firstBatch"] for index in (2, 4)] == [[{"_id": 1, "n": 1}], [{"_id": 1, "n": 2}]]


def test_a_refused_write_is_named_and_the_connection_goes_on(
    pipeline: Pipeline, database: pymongo.database.Database[Document]
) -> None:
    with pytest.raises(StatementRefused) as refused:
        pipeline.send([inserting(1), inserting(2, 1, 3), inserting(4)])
    assert (refused.value.code, refused.value.statement, refused.value.write) == (11000, 1, 1)
    assert stored(database) == [1, 2, 4]
    assert pipeline.find([find("things", {"_id": 4})]) == [[{"_id": 4}]]


def test_a_command_that_the_server_does_not_know_is_an_error(pipeline: Pipeline) -> None:
    with pytest.raises(OperationFailure, match="no such command"):
        pipeline.send([{"frobnicate": 1}, inserting(1)])


def test_results_larger_than_one_answer_are_whole(
    pipeline: Pipeline, database: pymongo.database.Database[Document]
) -> None:
    database["things"].insert_many([{"_id": number, "text": "x" * 900_000} for number in range(40)])
    small, large = pipeline.find([find("things", {"_id": 3}, {"_id": 1}), find("things", {})])
    assert small == [{"_id": 3}]
    assert sorted(document["_id"] for document in large) == list(range(40))


def test_writes_keep_their_order_in_as_few_commands_as_that_allows() -> None:
    writes = [replacement({"_id": 1}), update({"_id": 2}, {"$set": {"a": 1}}), removal(1), replacement({"_id": 1})]
    commands = write_commands("things", writes)
    assert [next(iter(command)) for command in commands] == ["update", "delete", "update"]
    assert [len(next(iter(list(command.values())[1:]))) for command in commands] == [2, 1, 1]


def test_a_transaction_is_seen_when_it_committed_and_never_after_an_abort(
    pipeline: Pipeline, database: pymongo.database.Database[Document]
) -> None:
    transactions = Transactions(pipeline)
    transactions.begin()
    transactions.run([inserting(1), inserting(2)])
    assert stored(database) == []
    transactions.commit()
    transactions.commit()
    assert stored(database) == [1, 2]
    transactions.begin()
    transactions.run([inserting(3)])
    transactions.abort()
    assert stored(database) == [1, 2]


def test_beginning_ends_what_the_same_writer_left_open(
    pipeline: Pipeline, database: pymongo.database.Database[Document]
) -> None:
    transactions = Transactions(pipeline)
    transactions.begin()
    transactions.run([inserting(1)])
    with pytest.raises(OperationFailure):
        _inserted(Transactions(pipeline), 1)
    _inserted(transactions, 1)
    assert stored(database) == [1]


def test_a_straggler_of_an_earlier_transaction_is_refused(
    pipeline: Pipeline, database: pymongo.database.Database[Document]
) -> None:
    transactions = Transactions(pipeline)
    transactions.begin()
    straggler = inserting(1)
    transactions.run([straggler])
    _inserted(transactions, 2)
    with pytest.raises(OperationFailure):
        pipeline.send([straggler])
    assert stored(database) == [2]


def test_nothing_of_a_transaction_with_a_refused_statement_is_kept(
    pipeline: Pipeline, database: pymongo.database.Database[Document]
) -> None:
    transactions = Transactions(pipeline)
    transactions.begin()
    with pytest.raises(StatementRefused):
        transactions.run([inserting(1), inserting(1), inserting(uuid.uuid4().hex)])
    with pytest.raises(OperationFailure):
        transactions.commit()
    assert stored(database) == []


def _inserted(transactions: Transactions, identifier: int) -> None:
    transactions.begin()
    transactions.run([inserting(identifier)])
    transactions.commit()
