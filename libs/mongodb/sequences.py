"""Integer ids, reserved in blocks: one round trip for many ids. A restart leaves a gap."""

import asyncio

from libs.mongodb.client import Collection, ReturnDocument

BLOCK = 50


class Sequences:
    """Gives out ids, never the same one twice, whatever the number of instances.

    Args:
        ids: the collection that stores the next id of each sequence.
    """

    def __init__(self, ids: Collection) -> None:
        self._ids = ids
        self._blocks: dict[str, range] = {}
        self._lock = asyncio.Lock()

    async def next(self, name: str, start: int = 1) -> int:
        """The next id of the sequence; the first is ``start``."""
        async with self._lock:
            block = self._blocks.get(name, range(0))
            if not block:
                block = await self._reserve(name, start)
            self._blocks[name] = block[1:]
            return block[0]

    async def _reserve(self, name: str, start: int) -> range:
        after = await self._ids.find_one_and_update(
            {"_id": name},
            [{"$set": {"next": {"$add": [{"$ifNull": ["$next", start]}, BLOCK]}}}],
            upsert=True,
            return_document=ReturnDocument.AFTER,
        )
        assert after is not None
        return range(after["next"] - BLOCK, after["next"])
