"""PostgreSQL's types as the catalogue of a server describes them, followed through domains to what they hold."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import asyncpg

# OIDs below this are assigned by PostgreSQL itself and the same on every server (documentation, section 74.2.2).
FIRST_NORMAL_OID = 16384
BUILT_IN_OID_MAX = 9999

_KINDS = {b"b": "scalar", b"e": "enum", b"c": "composite", b"r": "range", b"m": "range", b"p": "pseudo", b"d": "domain"}
# Their binary form is an OID that means something else on another server, or does not exist.
_BY_OID = frozenset(
    ("regclass", "regcollation", "regconfig", "regdictionary", "regnamespace", "regoper", "regoperator", "regproc")
) | frozenset(("regprocedure", "regrole", "regtype", "aclitem"))


@dataclass(frozen=True, slots=True)
class PostgresType:
    """What a column holds.

    Args:
        oid: of the type itself, domains resolved.
        typmod: its modifier: length, precision and scale; -1 for none.
        sql: how DDL writes it, such as ``numeric(12,2)``.
        schema, name: its catalogue name; ``_int4`` for arrays.
        kind: scalar, array, enum, composite, range or pseudo.
        labels: an enum's, in order.
        element: an array's.
        through_domain: the column, or the array's element, is declared as a domain.
    """

    oid: int
    typmod: int
    sql: str
    schema: str
    name: str
    kind: str
    labels: tuple[str, ...] = ()
    element: "PostgresType | None" = None
    through_domain: bool = False

    @property
    def built_in(self) -> bool:
        return self.oid <= BUILT_IN_OID_MAX and self.kind != "pseudo"

    @property
    def same_in_binary(self) -> bool:
        """Whether its binary form means the same on every server: an array's carries its element's OID."""
        if self.element is not None:
            return self.element.same_in_binary and not self.element.through_domain and self.built_in
        return self.built_in and self.name not in _BY_OID

    @property
    def precision_and_scale(self) -> tuple[int, int] | None:
        """Of a ``numeric`` that has them; the scale may be negative or above the precision since PostgreSQL 15."""
        if self.name != "numeric" or self.typmod < 4:
            return None
        modifier = self.typmod - 4
        scale = modifier & 0x7FF
        return modifier >> 16 & 0xFFFF, scale - 0x800 if scale & 0x400 else scale


@dataclass(frozen=True, slots=True)
class Column:
    """``declared`` is the type as the table has it, ``type`` what it is once domains are resolved."""

    name: str
    declared: str
    nullable: bool
    type: PostgresType

    @property
    def json_type(self) -> str:
        return json_type(self.type)


def json_type(postgres_type: PostgresType) -> str:
    """The type's name in a stream's ``type_schema``."""
    if postgres_type.kind == "array":
        return "array"
    match postgres_type.name:
        case "int2" | "int4" | "int8" | "oid":
            return "integer"
        case "float4" | "float8" | "numeric":
            return "number"
        case "bool":
            return "boolean"
        case "date" | "timestamp" | "timestamptz":
            return "timestamp"
        case "json" | "jsonb":
            return "object"
        case _:
            return "string"


async def columns_of(connection: "asyncpg.Connection[Any]", relation_oids: Sequence[int]) -> dict[int, list[Column]]:
    """The columns of each relation in their order, with their types resolved."""
    rows = await connection.fetch(
        """
        SELECT attrelid, attname, atttypid, atttypmod, attnotnull, format_type(atttypid, atttypmod) AS declared
        FROM pg_attribute WHERE attrelid = ANY($1::oid[]) AND attnum > 0 AND NOT attisdropped ORDER BY attrelid, attnum
        """,
        list(relation_oids),
    )
    known = await _load({row["atttypid"] for row in rows}, connection)
    resolver = _Resolver(known, await _names(known, rows, connection))
    columns: dict[int, list[Column]] = {oid: [] for oid in relation_oids}
    for row in rows:
        resolved = resolver.resolve(row["atttypid"], row["atttypmod"])
        columns[row["attrelid"]].append(Column(row["attname"], row["declared"], not row["attnotnull"], resolved))
    return columns


async def _load(oids: Iterable[int], connection: "asyncpg.Connection[Any]") -> dict[int, Any]:
    """The catalogue rows of the types and of all that they are made of."""
    known: dict[int, Any] = {}
    wanted = set(oids)
    while wanted:
        rows = await connection.fetch(
            """
            SELECT t.oid, t.typname, n.nspname, t.typtype, t.typbasetype, t.typtypmod,
                   CASE WHEN t.typlen = -1 AND t.typcategory = 'A' AND t.oid NOT IN (22, 30) THEN t.typelem ELSE 0
                   END AS element,
                   (SELECT array_agg(enumlabel::text ORDER BY enumsortorder) FROM pg_enum WHERE enumtypid = t.oid)
                   AS labels
            FROM pg_type t JOIN pg_namespace n ON n.oid = t.typnamespace WHERE t.oid = ANY($1::oid[])
            """,
            list(wanted),
        )
        known |= {row["oid"]: row for row in rows}
        wanted = {oid for row in rows for oid in (row["typbasetype"], row["element"]) if oid} - set(known)
    return known


async def _names(
    known: dict[int, Any], rows: Sequence[Any], connection: "asyncpg.Connection[Any]"
) -> dict[tuple[int, int], str]:
    """``format_type`` of every type that may come up, with every modifier that may come with it."""
    pairs = {(row["atttypid"], row["atttypmod"]) for row in rows}
    pairs |= {(info["typbasetype"], info["typtypmod"]) for info in known.values() if info["typbasetype"]}
    pairs |= {(known[oid]["element"], typmod) for oid, typmod in pairs if known[oid]["element"]}
    pairs |= {(oid, -1) for oid in known}
    ordered = sorted(pairs)
    texts = await connection.fetch(
        "SELECT format_type(o, m) AS text FROM unnest($1::oid[], $2::int[]) WITH ORDINALITY AS t(o, m, n) ORDER BY n",
        [oid for oid, _ in ordered],
        [typmod for _, typmod in ordered],
    )
    return {pair: row["text"] for pair, row in zip(ordered, texts, strict=True)}


@dataclass(frozen=True, slots=True)
class _Resolver:
    known: dict[int, Any]
    names: dict[tuple[int, int], str]

    def resolve(self, oid: int, typmod: int) -> PostgresType:
        info = self.known[oid]
        through_domain = False
        while info["typbasetype"]:
            oid, typmod, through_domain = info["typbasetype"], info["typtypmod"], True
            info = self.known[oid]
        element = self.resolve(info["element"], typmod) if info["element"] else None
        return PostgresType(
            oid=oid,
            typmod=typmod,
            sql=f"{element.sql}[]" if element else self.names[oid, typmod],
            schema=info["nspname"],
            name=info["typname"],
            kind="array" if element else _KINDS.get(info["typtype"], "pseudo"),
            labels=tuple(info["labels"] or ()),
            element=element,
            through_domain=through_domain,
        )
