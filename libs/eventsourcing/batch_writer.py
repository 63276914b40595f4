"""Commits a service's batches, one at a time, on the thread of its only caller.

Every batch increments the head in its transaction. That serialises the writers of one service, so positions have no
gaps, and a reader that goes by position can't skip an event that is committed late.

``BatchWriter.commit`` says what happens if the answer to a commit is lost.
"""

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from typing import Any

import structlog

from libs.core.errors import OutcomeUnknown, RetryLater
from libs.core.ids import uuid7
from libs.eventsourcing.batch import Batch, DecisionOutdated, OffsetMoved
from libs.eventsourcing.head import ExpectedHead, Head, HeadCache, head_of
from libs.eventsourcing.statements import (
    increment_of_any_head,
    increment_of_expected_head,
    reservations_of,
    statements_of,
)
from libs.eventsourcing.writer_sessions import SWAP, WriterSessions
from libs.mongodb.client import (
    MAJORITY,
    TRANSIENT,
    ConnectionFailure,
    Document,
    OperationFailure,
    PyMongoError,
    SyncDatabase,
    duplicate_key_of,
)
from libs.mongodb.commands import StatementRefused
from libs.mongodb.round_trips import UNKNOWN_COMMIT, Find, RoundTrips
from libs.mongodb.wake_ups import WAKE_UPS

OUTCOME_SECONDS_MAX = 10.0
SWAP_SECONDS_MAX = 4.0
"""How long a batch waits for a swap before it kills the swap's session; well below ``OUTCOME_SECONDS_MAX``."""
WRITE_CONFLICT = 112

log = structlog.get_logger(__name__)


class BatchWriter:
    """One process's writes to a service's store. All methods block; only ``find`` may be called from other threads.

    A batch takes three round trips: the finds that it is decided on, its statements, and its commit.

    Args:
        round_trips: to the service's database.
        database: the same database.
        cache: told of heads that this writer reads.
    """

    def __init__(self, round_trips: RoundTrips, database: SyncDatabase[Document], cache: HeadCache) -> None:
        self.id = uuid7()
        self.may_hold_locks = False
        self._round_trips = round_trips
        self._transactions = round_trips.transactions()
        self.session_id = self._transactions.session_id
        self._database = database
        self._cache = cache
        self._sessions = WriterSessions(database)
        # The head after this writer's last batch, unless another writer is known to commit too.
        self._expected: ExpectedHead | None = None
        # The head's count of batches after this writer's last one. After a failure it may be too low, which only
        # costs the next batch another round trip.
        self._own_batches: int | None = None
        # The batch whose commit was last sent: if any batch can have taken effect unnoticed, it is this one.
        self._sent: Batch | None = None

    def find(self, finds: Sequence[Find]) -> list[list[Document]]:
        """Run queries in one round trip."""
        return self._round_trips.find(finds)

    def commit(self, batch: Batch) -> int:
        """Commit a batch and return the position before its first event; durable when it returns.

        While a commit's result is unknown, the commit is repeated. If the server then says that the transaction is
        gone, or after another transient error, the same batch is run again. Its event ids are fixed: if it had taken
        effect after all, it conflicts with itself, and a majority read of its first event tells.

        Raises:
            DecisionOutdated: a version, a unique key, a collection name or the set of event types has changed.
            OffsetMoved: a consumer's offset is no longer the one that its step started from.
            OutcomeUnknown: the store did not say in time whether the batch was committed.
            RetryLater: the batch was not committed.
        """
        deadline = time.monotonic() + OUTCOME_SECONDS_MAX
        swap_deadline = time.monotonic() + SWAP_SECONDS_MAX
        for attempt in count(1):
            try:
                expected = self._run_statements(batch)
                self._commit_transaction(batch, expected, deadline)
                return expected.head.position
            except (DecisionOutdated, OffsetMoved):
                if (position := self._position_if_committed(batch)) is not None:
                    return position
                raise
            except PyMongoError as error:
                if not _is_transient(error) or time.monotonic() >= deadline:
                    raise self._failure(batch) from error
                if _is_write_conflict(error) and time.monotonic() >= swap_deadline:
                    self._kill_swap()
                    swap_deadline = deadline
            time.sleep(min(0.2, 0.001 * 2 ** min(attempt, 8)) * random.random())
        raise AssertionError("unreachable")

    def read_head(self) -> Head:
        """The head as it is now."""
        document = self._database["head"].find_one({"_id": "head"})
        if document is None:
            raise RetryLater("the event store has no head yet")
        self._cache.head = head_of(document)
        return self._cache.head

    def release_locks(self) -> None:
        """Abort the transaction that a broken connection left open; other instances wait for its locks."""
        try:
            self._transactions.abort()
            self.may_hold_locks = False
        except ConnectionFailure:
            self.may_hold_locks = True
        except PyMongoError:
            # The server rejected the abort, so there is no transaction.
            self.may_hold_locks = False

    def _run_statements(self, batch: Batch) -> ExpectedHead:
        """Run a batch's statements in a transaction that is then to be committed.

        A writer that is alone knows the head. It sends all statements in one round trip, and the head's increment is
        refused if another writer was faster. Otherwise the head is incremented and read first, in a round trip of its
        own: an instance far away, which always loses that race, still gets its turn.
        """
        expected, self._expected = self._expected, None
        if expected is not None and expected.suffices_for(batch):
            with suppress(_HeadMoved), self._transaction():
                self._run_on(batch, expected)
                return expected
        with self._transaction():
            expected = self._increment_and_read(batch)
            if statements := statements_of(batch, expected):
                self._run(batch, statements)
            return expected

    def _run_on(self, batch: Batch, expected: ExpectedHead) -> None:
        increments = [increment_of_expected_head(expected.head, len(batch.events)), *reservations_of(batch)]
        incremented, *_ = self._run(batch, increments + statements_of(batch, expected))
        if incremented["n"] != 1:
            raise _HeadMoved

    def _increment_and_read(self, batch: Batch) -> ExpectedHead:
        adds_kinds = self._cache.head is None or not batch.kinds <= self._cache.head.kinds
        increments = [increment_of_any_head(batch, adds_kinds=adds_kinds), *reservations_of(batch)]
        incremented, *reserved = self._run(batch, increments)
        if incremented["value"] is None:
            raise RetryLater("the event store has no head yet")
        head = head_of(incremented["value"])
        self._require_unchanged(batch, head)
        entering = {name: changes.entering for name, changes in batch.lists.items() if changes.entering}
        numbers = {
            name: int(reply["value"]["next"]) - entered
            for (name, entered), reply in zip(entering.items(), reserved, strict=True)
        }
        return ExpectedHead(head, numbers)

    def _require_unchanged(self, batch: Batch, head: Head) -> None:
        if head.collections != batch.collections:
            self._cache.head = head
            raise DecisionOutdated("the projections were swapped")
        if head.newer_types != batch.newer_types:
            self._cache.head = head
            raise DecisionOutdated("a newer version began to write events of its own")

    def _run(self, batch: Batch, statements: list[Document]) -> list[Document]:
        """Run statements in one round trip; a refusal is raised as what it means for the batch."""
        try:
            return self._transactions.run(statements)
        except OperationFailure as error:
            if isinstance(error, StatementRefused):
                match statements[error.statement].get("update"):
                    case "head":
                        raise _HeadMoved from None
                    case "offsets":
                        raise OffsetMoved(batch.offsets[error.write].key) from None
            if (duplicate := duplicate_key_of(error)) is not None:
                raise _outdated(*duplicate) from None
            raise

    def _commit_transaction(self, batch: Batch, expected: ExpectedHead, deadline: float) -> None:
        self._sent = batch
        after = expected.after(batch)
        wake_up: Document = {"position": after.head.position, "writer": self.id}
        announcement = {"insert": WAKE_UPS, "documents": [wake_up]} if batch.events else None
        while True:
            try:
                self._transactions.commit(then=announcement)
                break
            except PyMongoError as error:
                if not error.has_error_label(UNKNOWN_COMMIT) or time.monotonic() >= deadline:
                    self.may_hold_locks = True
                    raise
        is_alone = self._own_batches in (None, expected.head.batches)
        self._own_batches = after.head.batches
        self._expected = after if is_alone else None

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._transactions.begin()
        self.may_hold_locks = False
        try:
            yield
        except ConnectionFailure:
            # The next transaction ends this one; if none follows, ``release_locks`` does.
            self.may_hold_locks = True
            raise
        except BaseException as error:
            # After a transient error the server has aborted by itself.
            if not (isinstance(error, PyMongoError) and error.has_error_label(TRANSIENT)):
                self.release_locks()
            raise

    def _position_if_committed(self, batch: Batch) -> int | None:
        """The position before the batch's first event, if the batch has taken effect."""
        if batch is not self._sent or not batch.events:
            return None
        events = self._database["events"].with_options(read_concern=MAJORITY)
        try:
            first = events.find_one({"_id": batch.events[0].id}, {"position": 1})
        except PyMongoError as error:
            raise self._failure(batch) from error
        return None if first is None else int(first["position"]) - 1

    def _failure(self, batch: Batch) -> RetryLater:
        if batch is self._sent:
            return OutcomeUnknown(
                "the store did not confirm the change in time; repeat the request with its Idempotency-Key",
                retry_after_seconds=1,
            )
        return RetryLater("the store can't be reached; the change was not made", retry_after_seconds=1)

    def _kill_swap(self) -> None:
        """End a swap that keeps the head for too long; if its process is alive, it starts the swap again."""
        try:
            if self._sessions.kill(SWAP):
                log.warning("swap_ended", database=self._database.name)
        except PyMongoError as error:
            log.warning("swap_not_ended", database=self._database.name, error=str(error)[:200])


class _HeadMoved(Exception):
    """Another writer has committed since this writer's last batch."""


def _is_transient(error: PyMongoError) -> bool:
    return isinstance(error, ConnectionFailure) or any(map(error.has_error_label, (TRANSIENT, UNKNOWN_COMMIT)))


def _is_write_conflict(error: PyMongoError) -> bool:
    return isinstance(error, OperationFailure) and error.code == WRITE_CONFLICT


def _outdated(pattern: Mapping[str, Any], values: Mapping[str, Any]) -> DecisionOutdated:
    if "stream" in pattern:
        return DecisionOutdated("a stream has new events", streams=[values["stream"]])
    if "keys" in pattern:
        return DecisionOutdated("a unique key was taken", keys=[values["keys"]])
    return DecisionOutdated(f"a document appeared: {dict(pattern)}")
