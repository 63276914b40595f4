"""How many gateways there are: each writes into the shared database that it is alive."""

from libs.mongodb.client import Collection, IndexModel

ALIVE_MS = 10_000


class Presence:
    """This gateway among the others.

    Args:
        collection: one document for each gateway: ``_id``, and ``seen_at`` by MongoDB's clock.
        name: this gateway's.
    """

    def __init__(self, collection: Collection, name: str) -> None:
        self._collection = collection
        self._name = name
        self.gateways = 1
        """How many were alive when this one last announced itself; at least this one."""

    async def open(self) -> None:
        """Have MongoDB remove gateways that have been gone for long."""
        await self._collection.create_indexes([IndexModel("seen_at", expireAfterSeconds=10 * ALIVE_MS // 1000)])

    async def announce(self) -> None:
        """Record that this gateway is alive, and count those that are."""
        await self._collection.update_one({"_id": self._name}, [{"$set": {"seen_at": "$$NOW"}}], upsert=True)
        is_alive = {"$expr": {"$gt": ["$seen_at", {"$subtract": ["$$NOW", ALIVE_MS]}]}}
        self.gateways = max(1, await self._collection.count_documents(is_alive))

    async def leave(self) -> None:
        """Record that this gateway has ended."""
        await self._collection.delete_one({"_id": self._name})
