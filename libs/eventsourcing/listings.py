"""Reads of counted lists: their totals and any of their pages; ``list_changes`` tells how they are kept."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from libs.core.decider import Aggregate, Listing
from libs.eventsourcing.documents import Documents, Reader
from libs.eventsourcing.list_changes import BLOCK, ERA
from libs.mongodb.client import ASCENDING, DESCENDING, Document, IndexModel
from libs.process.read_budget import note_document


@dataclass(frozen=True, slots=True)
class Page:
    """Some of a list's documents, and how many the list has in all."""

    total: int
    documents: Sequence[Document]


class Lists:
    """Reads the lists of an aggregate; each page is of one moment.

    Args:
        documents: the service's documents.
        aggregate: one with a ``listing``.
    """

    def __init__(self, documents: Documents, aggregate: Aggregate[Any]) -> None:
        assert aggregate.listing is not None
        self._documents = documents
        self._aggregate = aggregate
        self._listing: Listing[Any] = aggregate.listing

    async def page(self, name: str, criteria: Mapping[str, Any], *, offset: int, limit: int) -> Page:
        """The documents of a list from ``offset`` on, newest first.

        Args:
            criteria: the equalities that make the list, for which ``list_index`` has made an index.
        """
        return await self._documents.in_snapshot(lambda reader: self._page(reader, name, criteria, offset, limit))

    def _page(self, reader: Reader, name: str, criteria: Mapping[str, Any], offset: int, limit: int) -> Page:
        eras = self._eras(reader, name)
        total = sum(era["n"] for era in eras)
        if offset >= total:
            return Page(total, ())
        ceiling, step = self._place(reader, eras, offset) if offset else (None, 0)
        numbers: Document = {"$gte": 0} if ceiling is None else {"$gte": 0, "$lt": ceiling}
        found = reader.collection(self._aggregate.collection).find(
            {**criteria, "number": numbers}, session=reader.session
        )
        # The planner would weigh the indexes of all lists against each other; the right one is known.
        found = found.hint(_key_pattern(criteria)).sort("number", DESCENDING).skip(step).limit(limit)
        return Page(total, list(_counted(found)))

    def _eras(self, reader: Reader, name: str) -> list[Document]:
        of_list = {"_id": {"$gte": f"{name}#", "$lt": f"{name}$"}}
        counts = reader.collection(self._listing.collection)
        return list(counts.find(of_list, {"n": 1}, session=reader.session).sort("_id", DESCENDING))

    def _place(self, reader: Reader, eras: Sequence[Document], offset: int) -> tuple[int, int]:
        """The number below which the block begins that holds the wanted entity, and how many stand before it there."""
        for era in eras:
            if offset < era["n"]:
                break
            offset -= era["n"]
        counts = reader.collection(self._listing.collection)
        document = counts.find_one({"_id": era["_id"]}, {"b": 1}, session=reader.session)
        assert document is not None, "a snapshot does not change"
        for block in sorted((int(block) for block in document["b"]), reverse=True):
            count = document["b"][str(block)]
            if offset < count:
                return _era_of(era["_id"]) * ERA + (block + 1) * BLOCK, offset
            offset -= count
        raise AssertionError(f"the blocks of {era['_id']} do not add up to its total")


def _counted(documents: Iterable[Document]) -> Iterator[Document]:
    for document in documents:
        note_document(document)
        yield document


def list_index(fields: Sequence[str]) -> IndexModel:
    """The index that pages of lists by these fields are read from; only what stands in a list is in it."""
    return IndexModel(list(_key_pattern(dict.fromkeys(fields))), partialFilterExpression={"number": {"$gte": 0}})


def _key_pattern(criteria: Mapping[str, Any]) -> list[tuple[str, int]]:
    return [(name, ASCENDING) for name in criteria] + [("number", ASCENDING)]


def _era_of(identifier: str) -> int:
    return int(identifier.rsplit("#", 1)[1])
