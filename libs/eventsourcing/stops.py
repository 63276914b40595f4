"""Records in a service's store which of its parts are stopped until an operator repairs them."""

from libs.core.clock import isoformat_z
from libs.core.errors import FixRequest
from libs.eventsourcing.event_store import EventStore
from libs.mongodb.client import Document

RELAY = "relay"
STOPS = "stops"


async def note_stop(store: EventStore, part: str, reason: str) -> None:
    """Record that ``part``, a topic or the relay, is stopped."""
    change: list[Document] = [{"$set": {"reason": {"$literal": reason[:1000]}, "stopped_at": "$$NOW"}}]
    await store.database[STOPS].update_one({"_id": part}, change, upsert=True)


async def forget_stop(store: EventStore, part: str) -> None:
    """Record that ``part`` is no longer stopped."""
    await store.database[STOPS].delete_one({"_id": part})


async def is_stopped(store: EventStore, part: str) -> bool:
    return await store.database[STOPS].find_one({"_id": part}) is not None


async def require_at_rest(store: EventStore) -> None:
    """Raise ``FixRequest`` if the service runs, unless its relay is stopped because the store was restored."""
    lease = await store.database["leases"].find_one({"$expr": {"$gt": ["$expires_at", "$$NOW"]}})
    if lease is None or await is_stopped(store, RELAY):
        return
    raise FixRequest(
        f"{store.database.name} is in use: the lease {lease['_id']!r} is held until "
        f"{isoformat_z(lease['expires_at'])}, so the service runs, or ended less than 5 s ago. Nothing was changed. "
        "Stop the service first; this command is only for a database that was restored from a backup"
    )
