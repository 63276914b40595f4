"""Shadow collections: what a rebuild writes beside the live collections until they are swapped."""

from collections.abc import Iterator, Sequence

from libs.core.ids import uuid7
from libs.eventsourcing.event_store import EventStore

INFIX = "__rebuilt_"


class Shadows:
    """The shadow collections of one rebuild, ``<logical name>__rebuilt_<id of the rebuild>``.

    Args:
        logical_names: of the collections that are rebuilt.
    """

    def __init__(self, store: EventStore, logical_names: Sequence[str]) -> None:
        suffix = INFIX + uuid7().replace("-", "")
        self._store = store
        self.names = {name: name + suffix for name in logical_names}
        self._unused = list(self.names.values())

    def __iter__(self) -> Iterator[str]:
        """The logical names."""
        return iter(self.names)

    def __getitem__(self, logical_name: str) -> str:
        return self.names[logical_name]

    async def create(self) -> None:
        """Create the shadows; those that an earlier rebuild left are dropped."""
        # Their rebuild has lost the lease, so it can neither swap them nor report on them.
        await self._drop(await self._left_over())
        for name in self.names.values():
            await self._store.database.create_collection(name)

    def swapped(self, former: Sequence[str]) -> None:
        """The shadows are the live collections now, and the former live ones are no longer used."""
        self._unused = list(former)

    async def drop_unused(self) -> None:
        """Drop the shadows, or the former live collections if they were swapped."""
        await self._drop(self._unused)

    async def _left_over(self) -> list[str]:
        live = (await self._store.head()).collections.values()
        existing = await self._store.database.list_collection_names()
        return [name for name in existing if INFIX in name and name.split(INFIX)[0] in self.names and name not in live]

    async def _drop(self, names: Sequence[str]) -> None:
        for name in names:
            await self._store.database.drop_collection(name)
