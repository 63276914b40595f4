"""The swap of a service's live collections for others: the last step of a rebuild."""

from collections.abc import Callable, Mapping

from libs.core.errors import RetryLater
from libs.eventsourcing.event_store import EventStore
from libs.eventsourcing.head import Head, head_of
from libs.eventsourcing.writer_sessions import SWAP, WriterSessions
from libs.mongodb.client import DURABLE, ClientSession, OperationFailure

INTERRUPTED = 11601


class SwapEnded(Exception):
    """A writer killed the swap's session, because the swap had kept the head for too long. Nothing was changed."""


def swap_collections(
    store: EventStore, swaps: Mapping[str, str], last_step: Callable[[ClientSession, Head], None]
) -> None:
    """Make other collections the live ones, in a transaction that increments the head like every batch. It blocks.

    Args:
        swaps: the new collection's name by its logical name.
        last_step: runs inside the transaction, while no batch can commit, and applies what the new collections still
            lack. It may run more than once.

    Raises:
        SwapEnded: a writer had waited too long and ended it; nothing was changed.
    """
    database = store.sync_database
    names = {f"projections.{logical}": actual for logical, actual in swaps.items()}

    def step(session: ClientSession) -> None:
        before = database["head"].find_one_and_update(
            {"_id": "head"}, {"$inc": {"batches": 1}, "$set": names}, session=session
        )
        if before is None:
            raise RetryLater("the event store has no head yet")
        last_step(session, head_of(before))

    sessions = WriterSessions(database)
    with database.client.start_session() as session:
        sessions.register(SWAP, session.session_id["id"])
        try:
            session.with_transaction(step, write_concern=DURABLE)
        except OperationFailure as error:
            if error.code == INTERRUPTED:
                raise SwapEnded from error
            raise
        finally:
            sessions.remove(SWAP)
    store.writer.read_head()
