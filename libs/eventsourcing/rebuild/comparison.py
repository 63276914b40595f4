"""Compares the live documents of a collection with the rebuilt ones, without holding either in memory."""

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

from libs.core.decider import Aggregate, PureCodeFailed
from libs.core.errors import NewerVersion
from libs.eventsourcing.entities import stored_document
from libs.eventsourcing.rebuild import bounds
from libs.eventsourcing.rebuild.report import CollectionReport
from libs.eventsourcing.stored_events import canonical_document
from libs.eventsourcing.view import known_of
from libs.mongodb.client import Document


def compare(
    name: str, live: Iterable[Document], rebuilt: Iterable[Document], aggregate: Aggregate[Any] | None
) -> CollectionReport:
    """Compare one collection.

    Args:
        name: its logical name.
        live, rebuilt: the documents, both sorted by id.
        aggregate: the one whose documents they are, if they are not a projection's.
    """
    live_hash, rebuilt_hash = hashlib.sha256(), hashlib.sha256()
    live_count = rebuilt_count = different_count = 0
    different: list[Any] = []
    for ours, theirs in side_by_side(live, rebuilt):
        left, right = (b"" if item is None else canonical_document(item) for item in (ours, theirs))
        if aggregate is not None and ours is not None and theirs is not None and left != right:
            left = canonical_document(_as_written_now(aggregate, ours, theirs))
        if ours is not None:
            live_count += 1
            live_hash.update(left + b"\n")
        if theirs is not None:
            rebuilt_count += 1
            rebuilt_hash.update(right + b"\n")
        if left != right:
            different_count += 1
            different.append((ours or theirs or {})["_id"])
            del different[bounds.DIFFERENCES_MAX :]
    return CollectionReport(
        name=name,
        live_count=live_count,
        rebuilt_count=rebuilt_count,
        live_hash=live_hash.hexdigest(),
        rebuilt_hash=rebuilt_hash.hexdigest(),
        different=tuple(different),
        different_count=different_count,
    )


def side_by_side(
    live: Iterable[Document], rebuilt: Iterable[Document]
) -> Iterator[tuple[Document | None, Document | None]]:
    """Pairs of documents with the same id, None where one side has none; both sides are sorted by id."""
    ours, theirs = iter(live), iter(rebuilt)
    left, right = next(ours, None), next(theirs, None)
    while left is not None or right is not None:
        if right is None or (left is not None and left["_id"] < right["_id"]):
            yield left, None
            left = next(ours, None)
        elif left is None or right["_id"] < left["_id"]:
            yield None, right
            right = next(theirs, None)
        else:
            yield left, right
            left, right = next(ours, None), next(theirs, None)


def _as_written_now(aggregate: Aggregate[Any], live: Document, rebuilt: Document) -> Document:
    """A live document as this version would write it: an earlier one left out fields that were added since."""
    try:
        known = known_of(aggregate, live)
    except (KeyError, NewerVersion, PureCodeFailed):
        return live
    assert known.state is not None
    time = known.time or rebuilt.get("time")
    return stored_document(
        live["_id"], known.version, known.project_id, known.keys, known.state, known.number, time, known.others
    )
