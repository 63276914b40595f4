"""Counted lists: exact totals and any page of lists with millions of entities, without counting when they are read.

The terms:

    list      the entities of one collection that match some filter, under a name; an entity can be in many lists
    number    what an entity gets when it enters its first list: the next integer of its collection.
              Lists are read newest first, that is by descending number.
    block     1,024 consecutive numbers: block 2 contains 2,048 to 3,071
    era       1,024 consecutive blocks, so 2^20 numbers

For each list there is one document of counts per era: how many entities of the list have their number in the era, and
in each of its blocks. If the list ``[7,"ERROR"]`` has the entities with the numbers 5, 2,050 and 2,051, then it is

    {_id: '[7,"ERROR"]#0000000', n: 3, b: {"0": 1, "2": 2}}

The page from offset 2 on: block 2, the newest, has only 2 entities, so the page begins in block 0, at its first entity:
it is found by one index scan below number 1,024 that skips nothing. So the thousandth page costs one small look-up more
than the first, and no scan skips more than 1,023 index keys.

Counts are incremented in the transaction that changes the entities, so they are exact. Counts of zero are removed, so
they are a pure function of the events, and a rebuild gives the same documents.
"""

from collections.abc import Iterable
from typing import TypeVar

from libs.mongodb.client import Document

BLOCK = 1 << 10
ERA = 1 << 20

Bucket = TypeVar("Bucket")


def counts_id(list_name: str, era: int) -> str:
    """The ``_id`` of the counts of a list in an era; the ids of a list sort by era."""
    return f"{list_name}#{era:07d}"


def era_of(identifier: str) -> int:
    return int(identifier.rsplit("#", 1)[1])


def counts_of(list_name: str) -> Document:
    """The criteria that select all counts of a list; "$" is the character after "#"."""
    return {"_id": {"$gte": f"{list_name}#", "$lt": f"{list_name}$"}}


def increments(changes: Iterable[tuple[str, int, int]]) -> dict[str, dict[str, int]]:
    """How the documents of counts change: an increment for each path that changes, by document id.

    Args:
        changes: lists, numbers, and by how much the list's count changes at the number.
    """
    by_document: dict[str, dict[str, int]] = {}
    for list_name, number, change in changes:
        era, within_era = divmod(number, ERA)
        paths = by_document.setdefault(counts_id(list_name, era), {"n": 0})
        paths["n"] += change
        block = f"b.{within_era // BLOCK}"
        paths[block] = paths.get(block, 0) + change
    effective = ((identifier, _without_zeros(paths)) for identifier, paths in by_document.items())
    return {identifier: paths for identifier, paths in effective if paths}


def locate(counts: Iterable[tuple[Bucket, int]], offset: int) -> tuple[Bucket, int]:
    """The bucket that contains the entity at ``offset``, and the entity's offset in this bucket.

    Args:
        counts: buckets, newest first, with the number of entities in each.
    """
    for bucket, count in counts:
        if offset < count:
            return bucket, offset
        offset -= count
    raise AssertionError("the counts do not add up to the list's total")


def number_above(era: int, block: int) -> int:
    """The lowest number above a block."""
    return era * ERA + (block + 1) * BLOCK


def _without_zeros(paths: dict[str, int]) -> dict[str, int]:
    return {path: change for path, change in paths.items() if change}
