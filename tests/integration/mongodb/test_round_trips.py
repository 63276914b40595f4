"""Both ways to MongoDB: commands pipelined on one connection, and one after the other with pymongo's sessions."""

from collections.abc import Callable, Iterator
from typing import Any

import pymongo
import pytest
from bson.int64 import Int64

from libs.mongodb.client import ConnectionFailure, Document, OperationFailure, SyncDatabase
from libs.mongodb.commands import StatementRefused, raise_for, removal, replacement, update, write_commands
from libs.mongodb.pipelined import PipelinedRoundTrips
from libs.mongodb.round_trips import UNKNOWN_COMMIT, Find, RoundTrips, Transactions
from libs.mongodb.sequential import SequentialRoundTrips
from libs.testing.cutting_proxy import CuttingProxy

Adapter = Callable[[SyncDatabase[Document]], RoundTrips]


@pytest.fixture(params=[PipelinedRoundTrips, SequentialRoundTrips])
def adapter(request: pytest.FixtureRequest) -> Adapter:
    made: Adapter = request.param
    return made


@pytest.fixture
def database(mongod: str, database_prefix: str) -> Iterator[SyncDatabase[Document]]:
    with pymongo.MongoClient[dict[str, Any]](mongod, w="majority") as client:
        database = client[f"{database_prefix}round_trips"]
        database.create_collection("things")
        yield database


@pytest.fixture
def proxy(database: SyncDatabase[Document]) -> Iterator[CuttingProxy]:
    address = database.client.address
    assert address is not None
    with CuttingProxy(address[1]) as cutting:
        yield cutting


@pytest.fixture
def round_trips(adapter: Adapter, database: SyncDatabase[Document]) -> RoundTrips:
    return adapter(database)


@pytest.fixture
def cut_round_trips(adapter: Adapter, database: SyncDatabase[Document], proxy: CuttingProxy) -> Iterator[RoundTrips]:
    """Through the proxy."""
    with pymongo.MongoClient[dict[str, Any]]("127.0.0.1", proxy.port, directConnection=True, w="majority") as client:
        yield adapter(client[database.name])


def inserting(*identifiers: Any) -> Document:
    return {"insert": "things", "documents": [{"_id": identifier} for identifier in identifiers]}


def stored(database: SyncDatabase[Document]) -> list[Any]:
    return sorted(document["_id"] for document in database["things"].find())


def committed(transactions: Transactions, *statements: Document) -> None:
    transactions.begin()
    transactions.run(statements)
    transactions.commit()


def test_statements_are_executed_and_answered_in_order(round_trips: RoundTrips) -> None:
    bump = write_commands("things", [update({"_id": 1}, {"$inc": {"n": 1}}, upsert=True)])[0]
    find = {"find": "things", "filter": {}}
    transactions = round_trips.transactions()
    transactions.begin()
    replies = transactions.run([inserting(1), dict(bump), dict(find), dict(bump), dict(find)])
    assert [replies[index]["cursor"]["firstBatch"] for index in (2, 4)] == [[{"_id": 1, "n": 1}], [{"_id": 1, "n": 2}]]
    transactions.abort()


def test_a_refused_write_is_named_and_the_connection_is_usable(
    round_trips: RoundTrips, database: SyncDatabase[Document]
) -> None:
    transactions = round_trips.transactions()
    transactions.begin()
    with pytest.raises(StatementRefused) as refused:
        transactions.run([inserting(1), inserting(2, 1, 3), inserting(4)])
    assert (refused.value.code, refused.value.statement, refused.value.write) == (11000, 1, 1)
    database["things"].insert_one({"_id": 5})
    assert round_trips.find([Find("things", {})]) == [[{"_id": 5}]]


def test_nothing_of_a_transaction_with_a_refused_statement_is_committed(
    round_trips: RoundTrips, database: SyncDatabase[Document]
) -> None:
    transactions = round_trips.transactions()
    transactions.begin()
    with pytest.raises(StatementRefused):
        transactions.run([inserting(1), inserting(1), inserting(2)])
    with pytest.raises(OperationFailure):
        transactions.commit()
    assert stored(database) == []


def test_a_command_that_the_server_does_not_know_is_an_error(round_trips: RoundTrips) -> None:
    transactions = round_trips.transactions()
    transactions.begin()
    with pytest.raises(OperationFailure):
        transactions.run([{"frobnicate": 1}, inserting(1)])


def test_all_documents_of_a_query_are_found(round_trips: RoundTrips, database: SyncDatabase[Document]) -> None:
    """More than fit into one reply."""
    database["things"].insert_many([{"_id": number, "text": "x" * 900_000} for number in range(40)])
    small, large = round_trips.find([Find("things", {"_id": 3}, {"_id": 1}), Find("things", {})])
    assert small == [{"_id": 3}]
    assert sorted(document["_id"] for document in large) == list(range(40))


def test_no_query_is_no_round_trip(round_trips: RoundTrips) -> None:
    assert round_trips.find([]) == []


def test_queries_are_repeated_after_a_broken_connection(
    cut_round_trips: RoundTrips, database: SyncDatabase[Document], proxy: CuttingProxy
) -> None:
    database["things"].insert_one({"_id": 1})
    proxy.cut_once(lambda sent: b"find\0" in sent, delivered=True)
    assert cut_round_trips.find([Find("things", {})]) == [[{"_id": 1}]]
    assert proxy.cuts == 1


def test_a_transaction_is_visible_once_it_is_committed_and_never_after_an_abort(
    round_trips: RoundTrips, database: SyncDatabase[Document]
) -> None:
    transactions = round_trips.transactions()
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


def test_there_is_nothing_to_abort_before_and_after_a_transaction(
    round_trips: RoundTrips, database: SyncDatabase[Document]
) -> None:
    transactions = round_trips.transactions()
    transactions.abort()
    committed(transactions, inserting(1))
    transactions.abort()
    committed(transactions, inserting(2))
    assert stored(database) == [1, 2]


def test_the_write_after_a_commit_is_made(round_trips: RoundTrips, database: SyncDatabase[Document]) -> None:
    transactions = round_trips.transactions()
    transactions.begin()
    transactions.run([inserting(1)])
    transactions.commit(then=inserting(2))
    assert stored(database) == [1, 2]


def test_beginning_ends_what_the_same_writer_left_open(
    round_trips: RoundTrips, database: SyncDatabase[Document]
) -> None:
    transactions = round_trips.transactions()
    transactions.begin()
    transactions.run([inserting(1)])
    with pytest.raises(OperationFailure):
        committed(round_trips.transactions(), inserting(1))
    committed(transactions, inserting(1))
    assert stored(database) == [1]


def test_a_late_statement_of_an_earlier_transaction_is_rejected(
    round_trips: RoundTrips, database: SyncDatabase[Document]
) -> None:
    transactions = round_trips.transactions()
    committed(transactions, inserting(1))
    committed(transactions, inserting(2))
    # pymongo would replace the session in a command, so the pipeline sends it.
    session = {"lsid": {"id": transactions.session_id}, "txnNumber": Int64(1), "autocommit": False}
    with pytest.raises(OperationFailure):
        PipelinedRoundTrips(database).send([inserting(3) | session])
    assert stored(database) == [1, 2]


@pytest.mark.parametrize("delivered", [True, False])
def test_a_commit_whose_reply_is_lost_can_be_repeated(
    cut_round_trips: RoundTrips, database: SyncDatabase[Document], proxy: CuttingProxy, delivered: bool
) -> None:
    """pymongo repeats it by itself; the pipeline says that the result is unknown."""
    transactions = cut_round_trips.transactions()
    transactions.begin()
    transactions.run([inserting(1)])
    proxy.cut_once(lambda sent: b"commitTransaction" in sent, delivered=delivered)
    labelled = []
    for _ in range(2):
        try:
            transactions.commit()
        except ConnectionFailure as error:
            labelled.append(error.has_error_label(UNKNOWN_COMMIT))
    assert all(labelled)
    assert len(labelled) <= proxy.cuts == 1
    assert stored(database) == [1]


def test_what_a_broken_connection_left_open_can_be_aborted(
    cut_round_trips: RoundTrips, round_trips: RoundTrips, database: SyncDatabase[Document], proxy: CuttingProxy
) -> None:
    transactions = cut_round_trips.transactions()
    transactions.begin()
    proxy.cut_once(lambda sent: b"insert" in sent, delivered=True)
    with pytest.raises(ConnectionFailure):
        transactions.run([inserting(1)])
    transactions.abort()
    committed(round_trips.transactions(), inserting(1))
    assert stored(database) == [1]


def test_writes_keep_their_order_in_as_few_commands_as_that_allows() -> None:
    writes = [replacement({"_id": 1}), update({"_id": 2}, {"$set": {"a": 1}}), removal(1), replacement({"_id": 1})]
    commands = write_commands("things", writes)
    assert [next(iter(command)) for command in commands] == ["update", "delete", "update"]
    assert [len(next(iter(list(command.values())[1:]))) for command in commands] == [2, 1, 1]


def test_a_reply_with_a_refused_write_is_an_error(database: SyncDatabase[Document]) -> None:
    database.command(inserting(1))
    reply = database.command(inserting(2, 1))
    with pytest.raises(StatementRefused):
        raise_for(reply, 0)
