"""Which gateways there are, by what each wrote into the shared database lately."""

from libs.mongodb.client import Collection, IndexModel

SEEN_MS = 10_000


class Presence:
    """This gateway among the others.

    Args:
        collection: one document a gateway: ``_id``, ``seen_at`` by the store's clock.
        holder: this gateway's name.
    """

    def __init__(self, collection: Collection, holder: str) -> None:
        self._collection = collection
        self._holder = holder
        self._known: int | None = None

    @property
    def gateways(self) -> int:
        """How many there are, as far as is known; at least this one."""
        return self._known or 1

    @property
    def is_alone(self) -> bool:
        """The database was read, and there was no other."""
        return self._known == 1

    async def open(self) -> None:
        """Let the store remove gateways that are long gone."""
        await self._collection.create_indexes([IndexModel("seen_at", expireAfterSeconds=10 * SEEN_MS // 1000)])

    async def announce(self) -> None:
        """Say that this gateway is here, and see who else is."""
        await self._collection.update_one({"_id": self._holder}, [{"$set": {"seen_at": "$$NOW"}}], upsert=True)
        is_here = {"$expr": {"$gt": ["$seen_at", {"$subtract": ["$$NOW", SEEN_MS]}]}}
        self._known = max(1, await self._collection.count_documents(is_here))

    async def leave(self) -> None:
        """Say that this gateway is gone."""
        await self._collection.delete_one({"_id": self._holder})
