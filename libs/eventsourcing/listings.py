"""Reads counted lists (see ``counted_lists``): their totals and any page."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from libs.core.decider import Aggregate, Listing
from libs.eventsourcing.counted_lists import counts_of, era_of, locate, number_above
from libs.eventsourcing.documents import Documents, Reader
from libs.mongodb.client import ASCENDING, DESCENDING, Document, IndexModel
from libs.process.read_budget import note_document


@dataclass(frozen=True, slots=True)
class Page:
    """Some documents of a list, and how many it has in all."""

    total: int
    documents: Sequence[Document]


class Lists:
    """The lists of an aggregate; total and documents of a page are of the same moment.

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
            name: the list's, as in the aggregate's ``listing``.
            criteria: the equalities that select the list's documents; ``list_index`` makes the index for them.
        """
        return await self._documents.in_snapshot(lambda reader: self._page(reader, name, criteria, offset, limit))

    def _page(self, reader: Reader, name: str, criteria: Mapping[str, Any], offset: int, limit: int) -> Page:
        eras = self._eras(reader, name)
        total = sum(era["n"] for era in eras)
        if offset >= total:
            return Page(total, ())
        below, skipped = self._start(reader, eras, offset) if offset else (None, 0)
        numbers: Document = {"$gte": 0} if below is None else {"$gte": 0, "$lt": below}
        found = reader.collection(self._aggregate.collection).find(
            {**criteria, "number": numbers}, session=reader.session
        )
        # The planner would have to try the indexes of all lists; the right one is known.
        found = found.hint(_key_pattern(criteria)).sort("number", DESCENDING).skip(skipped).limit(limit)
        return Page(total, list(_counted(found)))

    def _eras(self, reader: Reader, name: str) -> list[Document]:
        """The totals of a list's eras, newest first."""
        counts = reader.collection(self._listing.collection)
        return list(counts.find(counts_of(name), {"n": 1}, session=reader.session).sort("_id", DESCENDING))

    def _start(self, reader: Reader, eras: Sequence[Document], offset: int) -> tuple[int, int]:
        """The number above the block where a page begins, and how many entities of the block come before the page."""
        identifier, offset = locate(((era["_id"], era["n"]) for era in eras), offset)
        counts = reader.collection(self._listing.collection)
        document = counts.find_one({"_id": identifier}, {"b": 1}, session=reader.session)
        assert document is not None, "a snapshot does not change"
        newest_first = sorted(((int(block), count) for block, count in document["b"].items()), reverse=True)
        block, offset = locate(newest_first, offset)
        return number_above(era_of(identifier), block), offset


def _counted(documents: Iterable[Document]) -> Iterator[Document]:
    for document in documents:
        note_document(document)
        yield document


def list_index(fields: Sequence[str]) -> IndexModel:
    """The index for lists that these fields select; it contains only documents that are in a list."""
    return IndexModel(list(_key_pattern(dict.fromkeys(fields))), partialFilterExpression={"number": {"$gte": 0}})


def _key_pattern(criteria: Mapping[str, Any]) -> list[tuple[str, int]]:
    return [(name, ASCENDING) for name in criteria] + [("number", ASCENDING)]
