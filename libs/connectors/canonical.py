"""The canonical form of a row, which each end of a transfer computes by itself, and sums of the hashes of rows.

A row's canonical bytes are those of PostgreSQL's ``record_send``: the number of columns as int32, then per column the
OID of its type, the length of the value (-1 for null), both int32, and the value, all in network byte order. Values are
as the types' ``send`` functions give them: numbers in two's complement or IEEE 754, dates as days and times as
microseconds since 2000-01-01, texts in UTF-8. To mean the same everywhere,

- a NaN is 7ff8… (7fc0… in ``float4``), whatever its bits;
- what has no like in Arrow is its text, of type ``text``; so is every decimal that goes into one of Arrow's;
- an array is of type ``bytea``: its ``array_send``, where the flag that tells of nulls is zero. The flag may stand when
  the null that it was set for is gone.

The MD5 of the canonical bytes is the row's hash: of the hashes that PostgreSQL 12 to 18 all have, the cheapest that is
promised to stay the same. Rows are gathered in buckets by the last hexadecimal digits of the MD5 of their key's
canonical bytes, of the row's own where there is no key. A bucket counts its rows and sums the first 64 bits of their
hashes: a sum depends on no order and, unlike an exclusive or, counts repeated rows.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

METHOD = "md5 of each row's canonical bytes, summed by bucket of its key's md5"
BUCKET_DIGITS = 2
HASH_MODULUS = 1 << 64

# A key's values as texts, for people; empty where rows have no key.
Key: TypeAlias = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Bucket:
    """``hash`` is the sum of the rows' hashes modulo 2**64."""

    rows: int
    hash: int

    def __add__(self, other: "Bucket") -> "Bucket":
        return Bucket(self.rows + other.rows, (self.hash + other.hash) % HASH_MODULUS)


NO_ROWS = Bucket(0, 0)


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What one end holds; ``buckets`` are named by their hexadecimal digits, empty ones are absent."""

    buckets: Mapping[str, Bucket] = field(default_factory=dict)

    @classmethod
    def joined(cls, parts: Iterable["Fingerprint"]) -> "Fingerprint":
        """Of rows that are read in parts."""
        buckets: dict[str, Bucket] = {}
        for part in parts:
            for name, bucket in part.buckets.items():
                buckets[name] = buckets.get(name, NO_ROWS) + bucket
        return cls(buckets)

    @property
    def total(self) -> Bucket:
        return sum(self.buckets.values(), NO_ROWS)

    def bucket(self, name: str) -> Bucket:
        return self.buckets.get(name, NO_ROWS)

    def differing(self, other: "Fingerprint") -> list[str]:
        """The names of the buckets that differ."""
        return sorted(
            name for name in self.buckets.keys() | other.buckets.keys() if self.bucket(name) != other.bucket(name)
        )


@dataclass(frozen=True, slots=True)
class HashedRow:
    """``key_hash`` in hexadecimal digits."""

    key_hash: str
    hash: int
    key: Key


class End(Protocol):
    """One end of a comparison; every call reads the rows again."""

    async def fingerprint(self, suffix: str = "", digits: int = BUCKET_DIGITS) -> Fingerprint:
        """Of the rows whose key's hash ends with ``suffix``, in buckets by its last ``digits`` digits."""

    async def rows(self, suffix: str, rows_max: int) -> list[HashedRow]:
        """The rows of the bucket ``suffix``, up to ``rows_max``."""


class SourceEnd(End, Protocol):
    """The source's end, which knows what is compared.

    Attributes:
        columns: those that are compared.
        columns_not_compared: why, by column.
        key: the columns whose hash makes the bucket, none when it is the whole row's.
    """

    @property
    def columns(self) -> Sequence[str]: ...

    @property
    def columns_not_compared(self) -> Mapping[str, str]: ...

    @property
    def key(self) -> Sequence[str]: ...

    async def why_never_comparable(self) -> str | None:
        """Why two reads of the stream may differ in the same snapshot, None if they can't."""

    async def why_different(self) -> str | None:
        """Why a difference that was found does not prove a fault, None if it does."""
