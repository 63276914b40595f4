"""Counted lists: exact totals and pages of any number, without counting or skipping when they are read.

An entity gets the next number of its collection when it enters its lists, so that a list's order, newest first, is that
of falling numbers. For each list there is one document per era of 2^20 numbers: ``{_id: "<list>#<era>", n: how many of
the list's entities have their number in it, b: {block: how many of them in each block of 1,024 numbers}}``. These are
incremented in the transaction of the batch that changes the entities, by one write a list however many entities the
batch concerns, and never otherwise: they are as exact as the documents. Deleting an entity lowers its block by one and
moves no other entity. A page is found by adding up the eras, then the blocks of one era, and by one index scan that
begins at the right block and steps over at most 1,023 index keys: page 1,000 costs one small look-up more than page 1.
Zeros are removed, so that the counts are a pure function of the events and a rebuild gives the same bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from libs.mongodb.client import DURABLE, ClientSession, Document, SyncDatabase
from libs.mongodb.commands import Write, raise_for, removal, update, write_commands

ERA = 1 << 20
BLOCK = 1 << 10
NUMBERS = "#"
"""The ``_id`` of the document that holds the next number."""


@dataclass(slots=True)
class ListChanges:
    """What some events change in the lists of one collection.

    A number below zero is not known yet: -1 is the first that this change will be given, -2 the second.

    Args:
        entered: how many numbers are needed.
        counts: by how much the list's count at the number changes.
        documents: the owner's documents whose numbers are not known yet.
    """

    entered: int = 0
    counts: dict[tuple[str, int], int] = field(default_factory=dict)
    documents: list[tuple[Document, int]] = field(default_factory=list)

    def follow(self, before: Sequence[str], after: Sequence[str], number: int | None) -> int | None:
        """Account for one event of an entity that stood in the lists ``before``; gives its number after it."""
        if number is None and after:
            self.entered += 1
            number = -self.entered
        if number is None or before == after:
            return number
        for name in before:
            if name not in after:
                self._count(name, number, -1)
        for name in after:
            if name not in before:
                self._count(name, number, 1)
        return number if after else None

    def add(self, later: "ListChanges") -> None:
        """Take over what was followed on a copy that began where this one stands."""
        self.entered = later.entered
        for (name, number), change in later.counts.items():
            self._count(name, number, change)

    def continued(self) -> "ListChanges":
        """An empty change that gives the numbers after this one's."""
        return ListChanges(self.entered)

    def reservation(self, collection: str) -> Document:
        """The command that takes the numbers that are needed; its answer's ``next`` follows on the last of them."""
        change = {"$inc": {"next": self.entered}}
        return {"findAndModify": collection, "query": {"_id": NUMBERS}, "update": change, "upsert": True, "new": True}

    def statements(self, collection: str, first: int) -> list[Document]:
        """Number the documents and give the commands that count; the same again when it is called again.

        Args:
            first: the first of the numbers that were reserved.
        """
        for document, number in self.documents:
            document["number"] = first - number - 1
        return write_commands(collection, self._writes(first))

    def write(self, database: SyncDatabase[Document], collection: str, session: ClientSession | None) -> None:
        """Reserve, number and count in the caller's transaction, if there is one."""
        durable = {} if session is not None else {"writeConcern": DURABLE.document}
        first = 0
        if self.entered:
            reserved = database.command(self.reservation(collection) | durable, session=session)
            first = reserved["value"]["next"] - self.entered
        for statement in self.statements(collection, first):
            raise_for(database.command(statement | durable, session=session))

    def _count(self, name: str, number: int, change: int) -> None:
        self.counts[name, number] = self.counts.get((name, number), 0) + change

    def _writes(self, first: int) -> list[Write]:
        changes: dict[str, dict[str, int]] = {}
        for (name, unresolved), change in self.counts.items():
            if change == 0:
                continue
            number = unresolved if unresolved >= 0 else first - unresolved - 1
            era, within = divmod(number, ERA)
            of_era = changes.setdefault(_era_id(name, era), {"n": 0})
            path = f"b.{within // BLOCK}"
            of_era["n"] += change
            of_era[path] = of_era.get(path, 0) + change
        updates, removals = list[Write](), list[Write]()
        for identifier, increments in changes.items():
            effective = {path: change for path, change in increments.items() if change}
            if not effective:
                continue
            updates.append(update({"_id": identifier}, {"$inc": effective}, upsert=True))
            lowered = [path for path, change in effective.items() if change < 0]
            updates += [update({"_id": identifier, path: 0}, {"$unset": {path: ""}}) for path in lowered if path != "n"]
            if lowered:
                removals.append(removal(identifier, n=0))
        return updates + removals


def _era_id(name: str, era: int) -> str:
    return f"{name}#{era:07d}"
