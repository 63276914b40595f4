"""MongoDB commands one after the other with pymongo's own sessions: a round trip each."""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from libs.mongodb.client import Document, PyMongoError, SyncDatabase, WriteConcern
from libs.mongodb.commands import raise_for
from libs.mongodb.round_trips import COMMIT_WAIT_MS, Find


class SequentialRoundTrips:
    """One database's commands through a client.

    Args:
        database: the commands' database, of a blocking client.
    """

    def __init__(self, database: SyncDatabase[Document]) -> None:
        self._database = database

    def find(self, finds: Sequence[Find]) -> list[list[Document]]:
        return [list(self._database[find.collection].find(find.criteria, find.projection)) for find in finds]

    def transactions(self) -> "SequentialTransactions":
        return SequentialTransactions(self._database)


class SequentialTransactions:
    """A writer's transactions on one pymongo session."""

    def __init__(self, database: SyncDatabase[Document]) -> None:
        self._database = database
        self._session = database.client.start_session()

    @property
    def session_id(self) -> Any:
        return self._session.session_id["id"]

    def begin(self) -> None:
        if self._session.in_transaction:
            self._session.abort_transaction()
        self._session.start_transaction(write_concern=WriteConcern(w="majority", j=True, wtimeout=COMMIT_WAIT_MS))

    def run(self, statements: Sequence[Document]) -> list[Document]:
        replies = []
        for number, statement in enumerate(statements):
            reply = self._database.command(statement, session=self._session)
            raise_for(reply, number)
            replies.append(reply)
        return replies

    def commit(self, *, then: Document | None = None) -> None:
        self._session.commit_transaction()
        if then is not None:
            with suppress(PyMongoError):
                self._database.command(then | {"writeConcern": {"w": 0}})

    def abort(self) -> None:
        # pymongo refuses to abort after a commit and hides that an abort failed. A newer transaction ends any earlier
        # one, and its own statement can't fail unnoticed.
        self.begin()
        self._database.command({"find": "head", "limit": 1}, session=self._session)
        self._session.abort_transaction()
