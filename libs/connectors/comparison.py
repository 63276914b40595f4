"""Compares the two ends of a transfer and, if they differ, finds rows that do."""

from collections import Counter
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import Any

from libs.connectors.canonical import BUCKET_DIGITS, METHOD, Bucket, End, Fingerprint, HashedRow, Key, SourceEnd
from libs.connectors.concurrency import all_of
from libs.connectors.protocol import ConnectorRefused, ConnectorUnavailable, StreamName, StreamPlan, Target

BUCKETS_NAMED_MAX = 16
AFTER_COPYING = " after copying, so nothing was committed"
EXAMPLES_MAX = 5
KEY_CHARACTERS_MAX = 200
# Each bucket whose rows are listed costs both ends another read of the table.
BUCKETS_LISTED_MAX = 3
# A bucket of more rows is divided before its rows are listed.
ROWS_LISTED_MAX = 10_000
_SUFFIX_DIGITS_MAX = 8


@dataclass(frozen=True, slots=True)
class Comparison:
    """The result of a comparison.

    Args:
        verified: True if the ends are equal, None if they can't be compared.
        document: ``method``, ``columns``, ``columns_not_compared`` and ``key``. If ``comparable``: ``rows``, the totals
            ``source`` and ``destination``, and in ``EndsDiffer`` the differing ``buckets`` and ``examples`` of keys.
            Otherwise the ``reason``.
    """

    verified: bool | None
    document: dict[str, Any]


class EndsDiffer(ConnectorUnavailable):
    """Source and destination differ after copying: nothing is committed.

    Args:
        document: as in ``Comparison``.
    """

    default_code = "verification_failed"

    def __init__(self, message: str, document: dict[str, Any]) -> None:
        super().__init__(message)
        self.document = document


class DestinationChangesRows(ConnectorRefused):
    """As ``EndsDiffer``, if something at the destination is known to change rows: a retry would differ again."""

    default_code = "verification_failed"

    def __init__(self, message: str, document: dict[str, Any]) -> None:
        super().__init__(message)
        self.document = document


def why_not_comparable(plan: StreamPlan, *, is_complete: bool) -> str | None:
    """Why a target can't be compared with all of the source's rows; None if it can.

    Args:
        is_complete: the run also looked for rows that the source deleted, or loaded all rows.
    """
    if plan.disposition == "append":
        return "rows are appended, so that the target may hold several states of a row"
    if plan.deletes == "soft":
        return "rows that the source deleted are marked and stay"
    if not is_complete:
        return "rows that the source deleted are not looked for in this run"
    return None


def no_target(target: Target) -> Comparison:
    """What a comparison with a target that does not exist comes to."""
    return Comparison(None, {"comparable": False, "reason": f"the destination has no {target} yet"})


async def compare(
    stream: StreamName,
    source: SourceEnd,
    destination: End,
    expecting: Awaitable[Fingerprint | None] | None = None,
    *,
    circumstances: str = AFTER_COPYING,
) -> Comparison:
    """Compare the ends, which are read concurrently.

    Args:
        expecting: the source's fingerprint, if it is being taken already.
        circumstances: what a difference's message adds to the fact.

    Raises:
        EndsDiffer: names the buckets and keys that differ.
    """
    if (reason := await source.why_never_comparable()) is not None:
        return _not_comparable(source, reason)
    if expecting is None:
        expected, found = await all_of([source.fingerprint(), destination.fingerprint()])
    else:
        found = await destination.fingerprint()
        expected = await expecting or await source.fingerprint()
    document = _described(source) | {
        "comparable": True,
        "rows": expected.total.rows,
        "source": _shown(expected.total),
        "destination": _shown(found.total),
    }
    if found == expected:
        return Comparison(True, document)
    if (reason := await _why_no_proof(source, expected)) is not None:
        return _not_comparable(source, reason)
    raise await _difference(
        f"{stream}: source and destination differ{circumstances}", source, destination, expected, found, document
    )


async def _why_no_proof(source: SourceEnd, expected: Fingerprint) -> str | None:
    if (reason := await source.why_different()) is not None:
        return reason
    if await source.fingerprint() != expected:
        return "the source returned other rows when it was read again in the same snapshot"
    return None


def _described(source: SourceEnd) -> dict[str, Any]:
    described: dict[str, Any] = {"method": METHOD, "columns": list(source.columns), "key": list(source.key)}
    if source.columns_not_compared:
        described["columns_not_compared"] = dict(source.columns_not_compared)
    return described


def _not_comparable(source: SourceEnd, reason: str) -> Comparison:
    return Comparison(None, _described(source) | {"comparable": False, "reason": reason})


def _shown(bucket: Bucket) -> dict[str, Any]:
    return {"rows": bucket.rows, "hash": f"{bucket.hash:016x}"}


@dataclass(frozen=True, slots=True)
class _Examples:
    missing: list[Key]
    extra: list[Key]
    different: list[Key]


async def _difference(
    beginning: str,
    source: SourceEnd,
    destination: End,
    expected: Fingerprint,
    found: Fingerprint,
    document: dict[str, Any],
) -> EndsDiffer:
    differing = expected.differing(found)
    examples = await _examples(source, destination, expected, found) if source.key else None
    named = ", ".join([*differing[:BUCKETS_NAMED_MAX], *(["…"] if len(differing) > BUCKETS_NAMED_MAX else [])])
    document["buckets_differing"] = len(differing)
    document["buckets"] = [
        {"bucket": name, "source": _shown(expected.bucket(name)), "destination": _shown(found.bucket(name))}
        for name in differing[:BUCKETS_NAMED_MAX]
    ]
    parts = [
        f"{beginning}: {expected.total.rows} rows at the source, {found.total.rows} at the destination; "
        f"{len(differing)} of {16**BUCKET_DIGITS} buckets differ ({named})"
    ]
    if examples is not None:
        document["examples"] = {
            name: [list(key) for key in keys]
            for name, keys in (
                ("missing", examples.missing),
                ("extra", examples.extra),
                ("different", examples.different),
            )
        }
        parts += [
            f"{name}: {', '.join(_named(source.key, key) for key in keys)}"
            for name, keys in (
                ("missing at the destination", examples.missing),
                ("only at the destination", examples.extra),
                ("different", examples.different),
            )
            if keys
        ]
    return EndsDiffer("; ".join(parts), document)


async def _examples(source: End, destination: End, expected: Fingerprint, found: Fingerprint) -> _Examples:
    """Keys of the first differing buckets."""
    examples = _Examples([], [], [])
    for suffix in expected.differing(found)[:BUCKETS_LISTED_MAX]:
        more = await _examples_of(source, destination, expected, found, suffix)
        examples = _Examples(
            [*examples.missing, *more.missing][:EXAMPLES_MAX],
            [*examples.extra, *more.extra][:EXAMPLES_MAX],
            [*examples.different, *more.different][:EXAMPLES_MAX],
        )
    return examples


async def _examples_of(
    source: End, destination: End, expected: Fingerprint, found: Fingerprint, suffix: str
) -> _Examples:
    """Keys of a differing bucket, which is divided until it is small enough to list."""
    while max(expected.bucket(suffix).rows, found.bucket(suffix).rows) > ROWS_LISTED_MAX:
        digits = len(suffix) + BUCKET_DIGITS
        if digits > _SUFFIX_DIGITS_MAX:
            break
        expected, found = await source.fingerprint(suffix, digits), await destination.fingerprint(suffix, digits)
        narrower = expected.differing(found)
        if not narrower:
            break
        suffix = narrower[0]
    return _sorted_out(
        await source.rows(suffix, ROWS_LISTED_MAX + 1), await destination.rows(suffix, ROWS_LISTED_MAX + 1)
    )


def _sorted_out(source: Sequence[HashedRow], destination: Sequence[HashedRow]) -> _Examples:
    keys = {row.key_hash: row.key for row in (*destination, *source)}
    here, there = Counter(row.key_hash for row in source), Counter(row.key_hash for row in destination)
    hashes = [Counter((row.key_hash, row.hash) for row in rows) for rows in (source, destination)]
    other = {key for key, _ in (hashes[0] - hashes[1]) + (hashes[1] - hashes[0])}

    def some(wanted: set[str]) -> list[Key]:
        return sorted(tuple(text[:KEY_CHARACTERS_MAX] for text in keys[key_hash]) for key_hash in wanted)[:EXAMPLES_MAX]

    missing, extra = set(here - there), set(there - here)
    return _Examples(some(missing), some(extra), some(other - missing - extra))


def _named(columns: Sequence[str], key: Key) -> str:
    return "(" + ", ".join(f"{column} = {value}" for column, value in zip(columns, key, strict=True)) + ")"
