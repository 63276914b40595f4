"""MongoDB commands written to one connection together and answered in order: one round trip for all of them.

pymongo sends a command only after the reply to the previous one, and each passes through layers that cost more than
the server's work on it. A server executes a connection's commands one after the other, so commands that are known
beforehand can be sent at once. The connections are pymongo's own: pooling, TLS, authentication and server monitoring
remain its responsibility.
"""

from collections.abc import Sequence
from uuid import uuid4

from bson.binary import Binary, UuidRepresentation
from bson.codec_options import CodecOptions
from bson.int64 import Int64
from pymongo.client_session_shared import _UNKNOWN_COMMIT_ERROR_CODES
from pymongo.errors import ServerSelectionTimeoutError
from pymongo.message import _op_msg
from pymongo.server_selectors import writable_server_selector

from libs.mongodb.client import DURABLE, ConnectionFailure, Document, NetworkTimeout, OperationFailure, SyncDatabase
from libs.mongodb.commands import raise_for
from libs.mongodb.round_trips import COMMIT_WAIT_MS, UNKNOWN_COMMIT, Find

COMMIT_WRITE_CONCERN: Document = {**DURABLE.document, "wtimeout": COMMIT_WAIT_MS}
_MORE_TO_COME = 2
"""The ``moreToCome`` flag: the message gets no reply."""


class PipelinedRoundTrips:
    """One database's commands on a client's connections.

    Args:
        database: the commands' database, of a blocking client.
    """

    def __init__(self, database: SyncDatabase[Document]) -> None:
        self._client = database.client
        self._database = database.name
        self._codec: CodecOptions[Document] = database.client.codec_options

    def send(
        self, commands: Sequence[Document], database: str | None = None, *, unanswered: Document | None = None
    ) -> list[Document]:
        """Send all commands and return their replies.

        Args:
            commands: documents whose first key is the command's name. All are executed even if an earlier one fails,
                unless a transaction makes them depend on each other.
            database: another database than this one's.
            unanswered: a write that follows them and gets no reply.

        Raises:
            StatementRefused: a write was refused; the first one that was.
            OperationFailure: a command failed; the first one that did.
            ConnectionFailure: there is no server, or the connection broke: any of them may have been executed.
        """
        server = self._client._select_server(writable_server_selector, None, "pipeline")
        with self._client._checkout(server, None) as connection:
            encoded = [_op_msg(0, command, database or self._database, None, self._codec) for command in commands]
            wire = [message for _, message, _, _ in encoded]
            if unanswered is not None:
                write = unanswered | {"writeConcern": {"w": 0}}
                wire.append(_op_msg(_MORE_TO_COME, write, self._database, None, self._codec)[1])
            connection.send_message(b"".join(wire), max(largest for _, _, _, largest in encoded))
            # Every reply is received before any is checked: an unread one would answer the connection's next command.
            answers = [connection.receive_message(number) for number, _, _, _ in encoded]
            replies = [answer.command_response(self._codec) for answer in answers]
            for statement, reply in enumerate(replies):
                raise_for(reply, statement)
            return replies

    def find(self, finds: Sequence[Find]) -> list[list[Document]]:
        if not finds:
            return []
        commands = [_find_command(find) for find in finds]
        try:
            replies = self.send(commands)
        except (NetworkTimeout, ServerSelectionTimeoutError):
            raise
        except ConnectionFailure:
            replies = self.send(commands)
        return [self._all_of(reply["cursor"]) for reply in replies]

    def transactions(self) -> "PipelinedTransactions":
        return PipelinedTransactions(self)

    def _all_of(self, cursor: Document) -> list[Document]:
        documents: list[Document] = cursor["firstBatch"]
        while cursor["id"]:
            collection = cursor["ns"].split(".", 1)[1]
            cursor = self.send([{"getMore": cursor["id"], "collection": collection}])[0]["cursor"]
            documents += cursor["nextBatch"]
        return documents


class PipelinedTransactions:
    """A writer's transactions: all statements of a ``run`` in one round trip."""

    def __init__(self, round_trips: PipelinedRoundTrips) -> None:
        self._round_trips = round_trips
        self._session: Document = {"id": Binary.from_uuid(uuid4(), UuidRepresentation.STANDARD)}
        self._number = 0
        self._has_begun = False

    @property
    def session_id(self) -> Binary:
        identifier: Binary = self._session["id"]
        return identifier

    def begin(self) -> None:
        self._number += 1
        self._has_begun = False

    def run(self, statements: Sequence[Document]) -> list[Document]:
        for statement in statements:
            statement |= self._fields()
            if not self._has_begun:
                statement["startTransaction"] = True
                self._has_begun = True
        return self._round_trips.send(statements)

    def commit(self, *, then: Document | None = None) -> None:
        commit: Document = {"commitTransaction": 1, "writeConcern": COMMIT_WRITE_CONCERN} | self._fields()
        try:
            self._round_trips.send([commit], "admin", unanswered=then)
        except ConnectionFailure as error:
            error._add_error_label(UNKNOWN_COMMIT)
            raise
        except OperationFailure as error:
            if error.code in _UNKNOWN_COMMIT_ERROR_CODES:
                error._add_error_label(UNKNOWN_COMMIT)
            raise

    def abort(self) -> None:
        try:
            self._round_trips.send([{"abortTransaction": 1} | self._fields()], "admin")
        except OperationFailure:
            # The server has no open transaction of this number.
            return

    def _fields(self) -> Document:
        return {"lsid": self._session, "txnNumber": Int64(self._number), "autocommit": False}


def _find_command(find: Find) -> Document:
    """``batchSize`` lets the first reply hold as many documents as fit into a message."""
    command: Document = {"find": find.collection, "filter": find.criteria, "batchSize": 1_000_000}
    return command if find.projection is None else command | {"projection": find.projection}
