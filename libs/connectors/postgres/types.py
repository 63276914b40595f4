"""PostgreSQL's types as the catalogue of a server describes them, followed through domains to what they hold.

A type is portable when its values mean the same on every server. All others (object identifiers such as ``regclass``,
``aclitem``, types without an input function, and whatever is made of them) are read as text, into text.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import asyncpg

# OIDs below this are assigned by PostgreSQL itself and the same on every server (documentation, section 74.2.2).
BUILT_IN_OID_MAX = 9999

_KINDS = {b"b": "scalar", b"e": "enum", b"c": "composite", b"r": "range", b"m": "range", b"p": "pseudo", b"d": "domain"}
# PostgreSQL's own types whose values stand for themselves. The numbers of transactions, tuples, places in the log and
# objects (``xid``, ``tid``, ``pg_lsn``, ``oid``) are numbers in text and binary form alike, and stay the same numbers.
# A type that is not listed, also one that PostgreSQL is yet to get, goes as text.
_PORTABLE = frozenset(
    (
        *("bool", "int2", "int4", "int8", "float4", "float8", "numeric", "money", "oid", "xid", "xid8", "cid", "tid"),
        *("text", "varchar", "bpchar", "char", "name", "bytea", "bit", "varbit", "uuid", "refcursor", "pg_lsn"),
        *("date", "time", "timetz", "timestamp", "timestamptz", "interval", "json", "jsonb", "jsonpath", "xml"),
        *("inet", "cidr", "macaddr", "macaddr8", "tsvector", "tsquery", "txid_snapshot", "pg_snapshot"),
        *("point", "lseg", "line", "path", "box", "polygon", "circle", "int2vector", "oidvector"),
    )
)


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
        return self.built_in and (self.kind == "range" or self.name in _PORTABLE)

    @property
    def precision_and_scale(self) -> tuple[int, int] | None:
        """Of a ``numeric`` that has them; the scale may be negative or above the precision since PostgreSQL 15."""
        if self.name != "numeric" or self.typmod < 4:
            return None
        modifier = self.typmod - 4
        scale = modifier & 0x7FF
        return modifier >> 16 & 0xFFFF, scale - 0x800 if scale & 0x400 else scale


TEXT = PostgresType(25, -1, "text", "pg_catalog", "text", "scalar")
TEXT_ARRAY = PostgresType(1009, -1, "text[]", "pg_catalog", "_text", "array", element=TEXT)


@dataclass(frozen=True, slots=True)
class Column:
    """A column and how its values are read.

    Args:
        name: the target's name of it.
        declared: the type as the table has it.
        type: what is read: the type once domains are resolved, text where that is not portable.
        cast: makes ``type`` of the column where it is another, such as ``::text``.
        source: the source's name of it, if that is another.
    """

    name: str
    declared: str
    nullable: bool
    type: PostgresType
    cast: str = ""
    source: str | None = None

    @property
    def source_name(self) -> str:
        return self.name if self.source is None else self.source

    @property
    def expression(self) -> str:
        """The SQL expression of its values at the source."""
        return '"' + self.source_name.replace('"', '""') + '"' + self.cast

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
        resolved, cast = resolver.resolve(row["atttypid"], row["atttypmod"]), ""
        if not resolver.portable(row["atttypid"]):
            resolved = TEXT_ARRAY if resolved.element is not None else TEXT
            cast = f"::{resolved.sql}"
        columns[row["attrelid"]].append(Column(row["attname"], row["declared"], not row["attnotnull"], resolved, cast))
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
                   AS labels,
                   CASE WHEN t.typtype = 'c' THEN (
                       SELECT array_agg(atttypid) FROM pg_attribute
                       WHERE attrelid = t.typrelid AND attnum > 0 AND NOT attisdropped
                   ) WHEN t.typtype IN ('r', 'm') THEN (
                       -- Older servers have no multiranges.
                       SELECT array_agg(rngsubtype) FROM pg_range r
                       WHERE t.oid IN (rngtypid, (to_jsonb(r) ->> 'rngmultitypid')::oid)
                   ) END AS parts
            FROM pg_type t JOIN pg_namespace n ON n.oid = t.typnamespace WHERE t.oid = ANY($1::oid[])
            """,
            list(wanted),
        )
        known |= {row["oid"]: row for row in rows}
        made_of = ((row["typbasetype"], row["element"], *(row["parts"] or ())) for row in rows)
        wanted = {oid for oids in made_of for oid in oids if oid} - set(known)
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

    def portable(self, oid: int) -> bool:
        """Whether values of the type, and all that it is made of, mean the same on every server."""
        info = self.known[oid]
        if info["element"] and self.resolve(info["element"], -1).element is not None:
            # A domain over arrays within an array: no array of a destination's own types nests so.
            return False
        made_of = [inner for inner in (info["typbasetype"], info["element"], *(info["parts"] or ())) if inner]
        if made_of:
            return all(self.portable(inner) for inner in made_of)
        # What a type of an extension or an enum holds is its own matter: the destination needs the same type.
        return oid > BUILT_IN_OID_MAX or info["typname"] in _PORTABLE

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
