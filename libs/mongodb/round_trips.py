"""The port through which a writer reads and writes MongoDB: several commands in one call.

``PipelinedRoundTrips`` writes them to a connection at once, so a call takes one round trip. ``SequentialRoundTrips``
sends one after the other with pymongo's own sessions, a round trip each. Both pass the same tests.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from libs.mongodb.client import Document

UNKNOWN_COMMIT = "UnknownTransactionCommitResult"
COMMIT_WAIT_MS = 10_000
"""The ``wtimeout`` of a commit."""


@dataclass(frozen=True, slots=True)
class Find:
    """A query of which everything is read."""

    collection: str
    criteria: Document
    projection: Document | None = None


class RoundTrips(Protocol):
    """Commands to one database. Calls block and may come from any thread."""

    def find(self, finds: Sequence[Find]) -> list[list[Document]]:
        """Run queries, once more if the connection broke, and return all documents of each.

        Raises:
            OperationFailure: a query failed.
            ConnectionFailure: there is no server, or it does not answer.
        """
        ...

    def transactions(self) -> "Transactions":
        """The transactions of a new writer."""
        ...


class Transactions(Protocol):
    """The transactions of one writer: one at a time, all on one logical session.

    Beginning a transaction aborts what the writer's previous one left open after its connection broke or the server
    hung, and late statements of that one are rejected. Without this, its locks would be held for the server's
    ``transactionLifetimeLimitSeconds``.
    """

    @property
    def session_id(self) -> Any:
        """The logical session's id on the server (BSON binary)."""
        ...

    def begin(self) -> None:
        """Begin the next transaction; the server learns of it with its first statement."""
        ...

    def run(self, statements: Sequence[Document]) -> list[Document]:
        """Run statements in order and return their replies; if one fails, the transaction is over.

        Raises:
            StatementRefused: a write was refused; the first one that was.
            OperationFailure: a statement failed; the first one that did.
            ConnectionFailure: there is no server, or the connection broke: the transaction may be open.
        """
        ...

    def commit(self, *, then: Document | None = None) -> None:
        """Commit; may be repeated while the result is unknown.

        Args:
            then: an insert outside the transaction that follows the commit; nobody waits for it, and it may be lost
                or happen although the commit failed.

        Raises:
            OperationFailure: not committed, or unknown if labelled ``UnknownTransactionCommitResult``.
            ConnectionFailure: unknown; it has that label too.
        """
        ...

    def abort(self) -> None:
        """End whatever transaction of this writer is open on the server, if any.

        Raises:
            ConnectionFailure: there is no server, or the connection broke: one may still be open.
        """
        ...
