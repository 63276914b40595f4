"""Commands to MongoDB in flights: written to one connection together, answered in order.

pymongo sends a command when the former was answered, and each passes through layers that cost more than the server's
work on it. What is known beforehand can be sent at once: a connection's commands are executed one after the other. The
connections are pymongo's own: pooling, TLS, authentication and the monitoring of servers stay its business.
"""

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any
from uuid import uuid4

from bson.binary import Binary, UuidRepresentation
from bson.codec_options import CodecOptions
from bson.int64 import Int64
from pymongo import MongoClient
from pymongo.client_session_shared import _UNKNOWN_COMMIT_ERROR_CODES
from pymongo.errors import ServerSelectionTimeoutError
from pymongo.helpers_shared import _check_command_response
from pymongo.message import _op_msg
from pymongo.server_selectors import writable_server_selector

from libs.mongodb.client import DURABLE, ConnectionFailure, Document, NetworkTimeout, OperationFailure

COMMIT_WRITE_CONCERN: Document = {**DURABLE.document, "wtimeout": 10_000}
TRANSIENT = "TransientTransactionError"
UNKNOWN_COMMIT = "UnknownTransactionCommitResult"
_MORE_TO_COME = 2
"""The flag of a message that gets no answer."""


Write = tuple[str, Document]
"""One write of an ``update`` or ``delete`` command, with the command's name."""


class StatementRefused(OperationFailure):
    """One write of a command was refused; its code and details are the write's own.

    Args:
        statement: the index of the command in its flight.
        write: the index of the write in its command.
    """

    def __init__(self, error: Document, statement: int) -> None:
        super().__init__(error.get("errmsg", ""), error.get("code"), error)
        self.statement = statement
        self.write = int(error.get("index", 0))


class Pipeline:
    """One database's commands on a client's connections. It blocks; calls may come from any thread.

    Args:
        client: a blocking client.
        database: where commands go.
    """

    def __init__(self, client: MongoClient[Document], database: str) -> None:
        self._client = client
        self._database = database
        self._codec: CodecOptions[Document] = client.codec_options

    def send(
        self, commands: Sequence[Document], database: str | None = None, *, unanswered: Document | None = None
    ) -> list[Document]:
        """Send all and return their answers.

        Args:
            commands: documents whose first key is the command's name. All are executed, whatever becomes of those
                before them: only a transaction makes them depend on each other.
            database: where they go, if elsewhere.
            unanswered: a write behind them that nobody waits for.

        Raises:
            StatementRefused: a write was refused; the first that was.
            OperationFailure: a command failed; the first that did.
            ConnectionFailure: no server, or the connection broke: any number of them may have been executed.
        """
        server = self._client._select_server(writable_server_selector, None, "pipeline")
        with self._client._checkout(server, None) as connection:
            encoded = [_op_msg(0, command, database or self._database, None, self._codec) for command in commands]
            wire = [message for _, message, _, _ in encoded]
            if unanswered is not None:
                write = unanswered | {"writeConcern": {"w": 0}}
                wire.append(_op_msg(_MORE_TO_COME, write, self._database, None, self._codec)[1])
            connection.send_message(b"".join(wire), max(largest for _, _, _, largest in encoded))
            # All answers are taken before the first is looked at: the connection must not keep any.
            answers = [connection.receive_message(number) for number, _, _, _ in encoded]
            replies = [answer.command_response(self._codec) for answer in answers]
            for statement, reply in enumerate(replies):
                raise_for(reply, statement)
            return replies

    def find(self, finds: Sequence[Document]) -> list[list[Document]]:
        """Run ``find`` commands in one flight, again after a broken connection; every result whole."""
        if not finds:
            return []
        try:
            replies = self.send(finds)
        except (NetworkTimeout, ServerSelectionTimeoutError):
            raise
        except ConnectionFailure:
            replies = self.send(finds)
        return [self._whole(reply["cursor"]) for reply in replies]

    def _whole(self, cursor: Document) -> list[Document]:
        documents: list[Document] = cursor["firstBatch"]
        while cursor["id"]:
            collection = cursor["ns"].split(".", 1)[1]
            cursor = self.send([{"getMore": cursor["id"], "collection": collection}])[0]["cursor"]
            documents += cursor["nextBatch"]
        return documents


class Transactions:
    """The transactions of one writer: one at a time, each on the same logical session as the one before.

    That fences: beginning a transaction aborts whatever an earlier one left open (its connection broke, the server
    hung), and a straggler of it that the server only meets now is refused. Left alone it would hold its locks for the
    server's ``transactionLifetimeLimitSeconds``.

    Args:
        pipeline: where the statements go.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._session: Document = {"id": Binary.from_uuid(uuid4(), UuidRepresentation.STANDARD)}
        self._number = 0
        self._has_begun = False

    @property
    def session_id(self) -> Binary:
        """Names the session to the server."""
        identifier: Binary = self._session["id"]
        return identifier

    def begin(self) -> None:
        """Begin the next transaction; the server hears of it with its first statement."""
        self._number += 1
        self._has_begun = False

    def run(self, statements: Sequence[Document]) -> list[Document]:
        """Run statements in one flight; when one fails, those after it do too and the transaction is over.

        Raises as ``Pipeline.send``.
        """
        for statement in statements:
            statement |= self._fields()
            if not self._has_begun:
                statement["startTransaction"] = True
                self._has_begun = True
        return self._pipeline.send(statements)

    def commit(self, *, then: Document | None = None) -> None:
        """Commit; may be repeated while the result is unknown.

        Args:
            then: a write outside the transaction that follows it, unanswered; also when it did not commit.

        Raises:
            OperationFailure: it did not commit; with the label ``UnknownTransactionCommitResult`` that is not known.
            ConnectionFailure: it is not known whether it committed.
        """
        commit: Document = {"commitTransaction": 1, "writeConcern": COMMIT_WRITE_CONCERN} | self._fields()
        try:
            self._pipeline.send([commit], "admin", unanswered=then)
        except ConnectionFailure as error:
            error._add_error_label(UNKNOWN_COMMIT)
            raise
        except OperationFailure as error:
            if error.code in _UNKNOWN_COMMIT_ERROR_CODES:
                error._add_error_label(UNKNOWN_COMMIT)
            raise

    def abort(self) -> None:
        """Give up a transaction that may be open; raises as ``Pipeline.send``, also where it is not."""
        self._pipeline.send([{"abortTransaction": 1} | self._fields()], "admin")

    def _fields(self) -> Document:
        return {"lsid": self._session, "txnNumber": Int64(self._number), "autocommit": False}


def raise_for(reply: Document, statement: int = 0) -> None:
    """Raise what an answer says of failure, also of single writes.

    Raises:
        StatementRefused, OperationFailure, NotPrimaryError: as ``Pipeline.send``.
    """
    if reply.get("ok") == 1 and "writeErrors" not in reply and "writeConcernError" not in reply:
        return
    _check_command_response(reply, None, parse_write_concern_error=True)
    if refused := reply.get("writeErrors"):
        raise StatementRefused(refused[0], statement)


def find(collection: str, criteria: Document, projection: Document | None = None) -> Document:
    """The command; what it finds comes in one answer as far as that may be."""
    command: Document = {"find": collection, "filter": criteria, "batchSize": 1_000_000}
    return command if projection is None else command | {"projection": projection}


def replacement(document: Document) -> Write:
    """Puts a document in the place of the one with its ``_id``, or where there is none."""
    return update({"_id": document["_id"]}, document, upsert=True)


def update(criteria: Document, change: Document, *, upsert: bool = False) -> Write:
    return "update", {"q": criteria, "u": change, "upsert": upsert}


def removal(identifier: Any, **criteria: Any) -> Write:
    return "delete", {"q": {"_id": identifier, **criteria}, "limit": 1}


def write_commands(collection: str, writes: Iterable[Write]) -> list[Document]:
    """As few commands as keep the writes' order."""
    return [
        {name: collection, f"{name}s": [operation for _, operation in group]}
        for name, group in groupby(writes, key=lambda write: write[0])
    ]
