"""How a batch changes counted lists (see ``counted_lists``): one write per list and era, whatever changes in them."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from libs.eventsourcing.counted_lists import increments
from libs.mongodb.client import DURABLE, ClientSession, Document, SyncDatabase
from libs.mongodb.commands import Write, raise_for, removal, update, write_commands

NEXT_NUMBER = "#"
"""The ``_id`` of the document that holds the next number."""


@dataclass(slots=True)
class ListChanges:
    """Changes of the lists of one collection, made before the numbers of new entities are known.

    Until then such an entity has a provisional number: -1 for the first one, -2 for the second.

    Args:
        entering: how many entities need a number, because they enter their first list.
        counts: by how much the list's count changes at a number, which may be provisional.
        documents: the owner's documents with a provisional number, and that number.
    """

    entering: int = 0
    counts: dict[tuple[str, int], int] = field(default_factory=dict)
    documents: list[tuple[Document, int]] = field(default_factory=list)

    def move(self, before: Sequence[str], after: Sequence[str], number: int | None) -> int | None:
        """Move an entity from the lists ``before`` to the lists ``after``; returns its number, None if it left all."""
        if number is None and after:
            self.entering += 1
            number = -self.entering
        if number is None or before == after:
            return number
        for name in before:
            if name not in after:
                self._count(name, number, -1)
        for name in after:
            if name not in before:
                self._count(name, number, 1)
        return number if after else None

    def draft(self) -> "ListChanges":
        """Empty changes that continue these ones: they give out the next provisional numbers."""
        return ListChanges(self.entering)

    def accept(self, draft: "ListChanges") -> None:
        """Add the changes of a draft that these ones made."""
        self.entering = draft.entering
        for (name, number), change in draft.counts.items():
            self._count(name, number, change)

    def reservation(self, collection: str) -> Document:
        """The command that reserves the needed numbers; the ``next`` in its reply follows the last of them."""
        change = {"$inc": {"next": self.entering}}
        return {
            "findAndModify": collection,
            "query": {"_id": NEXT_NUMBER},
            "update": change,
            "upsert": True,
            "new": True,
        }

    def statements(self, collection: str, first: int) -> list[Document]:
        """Set the numbers in the documents, and return the commands that count; may be called again.

        Args:
            first: the first of the reserved numbers.
        """
        for document, provisional in self.documents:
            document["number"] = _final(provisional, first)
        counts = ((name, _final(number, first), change) for (name, number), change in self.counts.items() if change)
        return write_commands(collection, _writes(increments(counts)))

    def write(self, database: SyncDatabase[Document], collection: str, session: ClientSession | None) -> None:
        """Reserve the numbers, set them and count, in the caller's transaction if there is one. It blocks."""
        durable = {} if session is not None else {"writeConcern": DURABLE.document}
        first = 0
        if self.entering:
            reserved = database.command(self.reservation(collection) | durable, session=session)
            first = reserved["value"]["next"] - self.entering
        for statement in self.statements(collection, first):
            raise_for(database.command(statement | durable, session=session))

    def _count(self, name: str, number: int, change: int) -> None:
        self.counts[name, number] = self.counts.get((name, number), 0) + change


def _final(number: int, first: int) -> int:
    return number if number >= 0 else first - number - 1


def _writes(by_document: dict[str, dict[str, int]]) -> list[Write]:
    """The writes that increment counts, and remove those that became zero."""
    updates, removals = list[Write](), list[Write]()
    for identifier, paths in by_document.items():
        updates.append(update({"_id": identifier}, {"$inc": paths}, upsert=True))
        lowered = [path for path, change in paths.items() if change < 0]
        updates += [update({"_id": identifier, path: 0}, {"$unset": {path: ""}}) for path in lowered if path != "n"]
        if lowered:
            removals.append(removal(identifier, n=0))
    return updates + removals
