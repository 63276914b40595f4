"""A batch as MongoDB commands."""

from collections.abc import Sequence
from typing import Any

from libs.eventsourcing.batch import Batch, OffsetMove, SideWrite
from libs.eventsourcing.head import ExpectedHead, Head
from libs.eventsourcing.stored_events import document_of
from libs.mongodb.client import Document
from libs.mongodb.commands import Write, removal, replacement, write_commands


def statements_of(batch: Batch, expected: ExpectedHead) -> list[Document]:
    """What a batch writes besides the head and the next numbers of its lists."""
    statements = list[Document]()
    if batch.offsets:
        statements.append({"update": "offsets", "updates": [_move(move) for move in batch.offsets]})
    if batch.events:
        statements.append({"insert": "events", "documents": _numbered_events(batch, expected.head)})
    for name, changes in batch.lists.items():
        statements += changes.statements(batch.collections[name], expected.numbers.get(name, 0))
    statements += _changed_documents(batch)
    # Inserts come last, so that a new document can take a unique key which a replacement frees.
    for name, documents in batch.inserts.items():
        statements.append({"insert": batch.collections[name], "documents": documents})
    statements += _side_writes(batch.side_writes)
    if batch.idempotency:
        statements.append({"insert": "idempotency", "documents": batch.idempotency})
    return statements


def increment_of_expected_head(head: Head, events: int) -> Document:
    """Increments the head; refused if the head is another than this one."""
    fields = {"batches": head.batches, "position": head.position, "store_id": {"$literal": head.store_id}}
    is_expected = {"$and": [{"$eq": [f"${name}", value]} for name, value in fields.items()]}
    position = _or_refuse(is_expected, {"$add": ["$position", events]})
    change = {"position": position, "batches": {"$add": ["$batches", 1]}}
    return {"update": "head", "updates": [{"q": {"_id": "head"}, "u": [{"$set": change}]}]}


def increment_of_any_head(batch: Batch, *, adds_kinds: bool) -> Document:
    """Increments the head whatever it is; the reply's ``value`` is the head before."""
    change: Document = {"$inc": {"position": len(batch.events), "batches": 1}}
    if adds_kinds:
        change["$addToSet"] = {"kinds": {"$each": sorted(batch.kinds)}}
    return {"findAndModify": "head", "query": {"_id": "head"}, "update": change}


def reservations_of(batch: Batch) -> list[Document]:
    """Takes the numbers of the entities that enter lists, one command for each collection of lists."""
    return [changes.reservation(batch.collections[name]) for name, changes in batch.lists.items() if changes.entering]


def _numbered_events(batch: Batch, head: Head) -> list[Document]:
    documents = [document_of(envelope) for envelope in batch.events]
    for position, document in enumerate(documents, head.position + 1):
        document["position"] = position
    return documents


def _move(move: OffsetMove) -> Document:
    """Moves a consumer's offset; refused if it is no longer where the consumer started. A missing one counts as 0."""
    is_expected = {"$eq": [{"$ifNull": ["$offset", 0]}, move.expected_offset]}
    change = {
        "offset": _or_refuse(is_expected, move.next_offset),
        "position": move.position,
        "store_id": {"$literal": move.store_id},
    }
    return {"q": {"_id": move.key}, "u": [{"$set": change}], "upsert": True}


def _or_refuse(condition: Document, value: Any) -> Document:
    """The value if the condition holds; otherwise the conversion fails, which refuses the write.

    The converted text contains a field, because the server evaluates a constant expression beforehand and would
    always fail.
    """
    return {"$cond": [condition, value, {"$toInt": {"$concat": ["changed meanwhile: ", "$_id"]}}]}


def _changed_documents(batch: Batch) -> list[Document]:
    commands = []
    for name in batch.replacements.keys() | batch.removals.keys():
        writes: list[Write] = [replacement(document) for document in batch.replacements.get(name, ())]
        writes += [removal(identifier) for identifier in batch.removals.get(name, ())]
        commands += write_commands(batch.collections[name], writes)
    return commands


def _side_writes(side_writes: Sequence[SideWrite]) -> list[Document]:
    by_collection: dict[str, list[Write]] = {}
    for write in side_writes:
        operation = removal(write.id) if write.document is None else replacement({**write.document, "_id": write.id})
        by_collection.setdefault(write.collection, []).append(operation)
    return [command for name, writes in by_collection.items() for command in write_commands(name, writes)]
