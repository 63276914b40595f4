"""The collections and indexes of a service's store. Everything here is safe to run in several instances at once."""

from collections.abc import Mapping, Sequence
from typing import Any

from libs.core.ids import uuid7
from libs.mongodb.client import ASCENDING, Database, Document, IndexModel, OperationFailure
from libs.mongodb.wake_ups import WAKE_UPS

IDEMPOTENCY_SECONDS = 24 * 3600
WAKE_UPS_BYTES = 64 * 1024
NAMESPACE_EXISTS = 48

WITHOUT_INDEXES = {"offsets", "secrets", "leases", "ids", "relay", "stops"}
"""Collections that are created beforehand, because a transaction must not wait for an implicit creation."""
_HELD_IN_ORDER = IndexModel([("topic", ASCENDING), ("position", ASCENDING), ("offset", ASCENDING)])
INDEXES = {
    "events": [
        IndexModel([("stream", ASCENDING), ("version", ASCENDING)], unique=True),
        IndexModel([("position", ASCENDING)], unique=True),
        IndexModel([("topic", ASCENDING), ("position", ASCENDING)]),
    ],
    "idempotency": [IndexModel([("created_at", ASCENDING)], expireAfterSeconds=IDEMPOTENCY_SECONDS)],
    "parked": [_HELD_IN_ORDER],
    "passed_over": [_HELD_IN_ORDER],
}


async def create_head(database: Database, collections: Sequence[str]) -> None:
    """Create the head; each new logical name stands for the collection of the same name."""
    heads = database["head"]
    new = {"position": 0, "batches": 0, "store_id": uuid7(), "projections": {}}
    await heads.update_one({"_id": "head"}, {"$setOnInsert": new}, upsert=True)
    for name in collections:
        missing: Document = {"_id": "head", f"projections.{name}": {"$exists": False}}
        await heads.update_one(missing, {"$set": {f"projections.{name}": name}})


async def create_collections(
    database: Database, live: Mapping[str, str], indexes: Mapping[str, Sequence[IndexModel]]
) -> None:
    """Create all collections with their indexes.

    Args:
        live: the actual name of each aggregate's and projection's collection, by its logical name.
        indexes: further indexes by logical or plain collection name.
    """
    for name, models in INDEXES.items():
        await database[name].create_indexes(models)
    for logical, actual in live.items():
        await create_indexes(database, actual, indexes.get(logical, ()))
    for name in indexes.keys() - live.keys():
        await database[name].create_indexes(list(indexes[name]))
    for name in WITHOUT_INDEXES - set(await database.list_collection_names()):
        await _create_collection(database, name)


async def create_indexes(database: Database, name: str, further: Sequence[IndexModel]) -> None:
    """The indexes of a collection of aggregates or projections, live or shadow."""
    unique = IndexModel([("keys", ASCENDING)], unique=True, sparse=True)
    await database[name].create_indexes([unique, *further])


async def create_wake_ups(database: Database, position: int, writer_id: str) -> None:
    """Create the capped collection of wake-ups with a first one: a cursor can't wait at the end of an empty one."""
    if not (await database[WAKE_UPS].options()).get("capped"):
        # An insert after it was dropped has created it again, without a cap.
        await database.drop_collection(WAKE_UPS)
        await _create_collection(database, WAKE_UPS, capped=True, size=WAKE_UPS_BYTES)
    await database[WAKE_UPS].insert_one({"position": position, "writer": writer_id})


async def _create_collection(database: Database, name: str, **options: Any) -> None:
    try:
        await database.create_collection(name, check_exists=False, **options)
    except OperationFailure as error:
        if error.code != NAMESPACE_EXISTS:
            raise
