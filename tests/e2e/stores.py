"""What the services' databases hold, read directly."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pymongo

from libs.testing.suite import Suite

Document = dict[str, Any]


@contextmanager
def database(suite: Suite, service: str) -> "Iterator[pymongo.database.Database[Document]]":
    """A service's database, in majority reads."""
    with pymongo.MongoClient[Document](suite.mongodb_url, readConcernLevel="majority") as client:
        yield client[f"datasync_{service}"]


def stored_events(suite: Suite, service: str) -> list[Document]:
    """Every event of a service's store, in position order."""
    with database(suite, service) as stored:
        return list(stored["events"].find().sort("position", 1))


def head_position(suite: Suite, service: str) -> int:
    with database(suite, service) as stored:
        head = stored["head"].find_one({"_id": "head"})
        assert head is not None
        position: int = head["position"]
        return position


def projected(suite: Suite, service: str, collection: str) -> dict[Any, Document]:
    """The documents of a service's live collection of that logical name, by id."""
    with database(suite, service) as stored:
        head = stored["head"].find_one({"_id": "head"})
        assert head is not None
        return {document["_id"]: document for document in stored[head["projections"][collection]].find()}
