"""Clients of MongoDB. Everything of motor and pymongo that the other modules use is imported from here.

A client reads from the primary, writes with ``w: majority, j: true``, gives timezone-aware datetimes, and limits the
time of everything that waits.
"""

import re
from collections.abc import Mapping
from typing import Any

from bson import encode
from motor.motor_asyncio import AsyncIOMotorClient, AsyncIOMotorCollection, AsyncIOMotorCursor, AsyncIOMotorDatabase
from pymongo import (
    ASCENDING,
    DESCENDING,
    CursorType,
    DeleteOne,
    IndexModel,
    MongoClient,
    ReplaceOne,
    ReturnDocument,
    UpdateOne,
)
from pymongo.client_session import ClientSession
from pymongo.collection import Collection as SyncCollection
from pymongo.database import Database as SyncDatabase
from pymongo.errors import (
    BulkWriteError,
    ConnectionFailure,
    DuplicateKeyError,
    InvalidOperation,
    NetworkTimeout,
    OperationFailure,
    PyMongoError,
)
from pymongo.read_concern import ReadConcern
from pymongo.write_concern import WriteConcern

Document = dict[str, Any]
Client = AsyncIOMotorClient[Document]
Database = AsyncIOMotorDatabase[Document]
Collection = AsyncIOMotorCollection[Document]
Cursor = AsyncIOMotorCursor[Document]

MAJORITY = ReadConcern("majority")
DURABLE = WriteConcern(w="majority", j=True)

# The label of an error after which a whole transaction may be tried again.
TRANSIENT = "TransientTransactionError"
SELECT_SERVER_MS = 3_000
CONNECT_MS = 3_000
SOCKET_MS = 10_000
SHORT_CHARACTERS_MAX = 200
_PASSING_CODES = frozenset(
    {
        175,  # QueryPlanKilled: the collection was replaced during the query
        239,  # SnapshotTooOld
        246,  # SnapshotUnavailable: after a restart, or when collections were replaced
    }
)

__all__ = [
    "ASCENDING",
    "DESCENDING",
    "DURABLE",
    "MAJORITY",
    "TRANSIENT",
    "BulkWriteError",
    "Client",
    "ClientSession",
    "Collection",
    "ConnectionFailure",
    "Cursor",
    "CursorType",
    "Database",
    "DeleteOne",
    "Document",
    "DuplicateKeyError",
    "IndexModel",
    "InvalidOperation",
    "NetworkTimeout",
    "OperationFailure",
    "PyMongoError",
    "ReplaceOne",
    "ReturnDocument",
    "SyncCollection",
    "SyncDatabase",
    "UpdateOne",
    "WriteConcern",
    "connect",
    "document_bytes",
    "duplicate_key_of",
    "in_short",
    "is_passing",
    "synchronous",
]


def connect(url: str, app_name: str = "datasync", *, pool_min: int = 0, pool_max: int = 50) -> Client:
    """A client for ``url``. It connects on first use and reconnects by itself.

    Args:
        pool_min, pool_max: how many connections it keeps open, and how many it may have at a time.
    """
    return AsyncIOMotorClient(
        url,
        appname=app_name,
        tz_aware=True,
        w="majority",
        journal=True,
        retryWrites=True,
        serverSelectionTimeoutMS=SELECT_SERVER_MS,
        connectTimeoutMS=CONNECT_MS,
        socketTimeoutMS=SOCKET_MS,
        minPoolSize=pool_min,
        maxPoolSize=pool_max,
    )


def document_bytes(document: Document) -> int:
    """A document's size as the server counts it."""
    return len(encode(document))


def synchronous(client: Client) -> MongoClient[Document]:
    """The blocking client inside a motor client, with the same connections: for code on a thread of its own."""
    delegate: MongoClient[Document] = client.delegate
    return delegate


def is_passing(error: BaseException) -> bool:
    """Whether the same operation may succeed a moment later, so that an error is no defect of the code."""
    return isinstance(error, ConnectionFailure) or (
        isinstance(error, OperationFailure) and (error.code in _PASSING_CODES or error.has_error_label(TRANSIENT))
    )


def in_short(error: BaseException) -> str:
    """An error as one line of a log, without the description of the servers that ends pymongo's messages."""
    text = str(error)
    if isinstance(error, PyMongoError):
        text = re.split(r" \(configured timeouts|, Timeout: |, Topology Description: ", text, maxsplit=1)[0]
    return f"{type(error).__name__}: {text}"[:SHORT_CHARACTERS_MAX]


def duplicate_key_of(error: PyMongoError) -> tuple[Mapping[str, Any], Mapping[str, Any]] | None:
    """The index and the values of a duplicate key error (code 11000); None for any other error."""
    details: Mapping[str, Any] | None = None
    if isinstance(error, BulkWriteError):
        details = next(iter(error.details.get("writeErrors", ())), None)
    elif isinstance(error, OperationFailure):
        details = error.details
    if not details or details.get("code") != 11000:
        return None
    return details.get("keyPattern", {}), details.get("keyValue", {})
