"""MongoDB commands as documents, and the errors in their replies."""

from collections.abc import Iterable
from itertools import groupby
from typing import Any

from pymongo.helpers_shared import _check_command_response

from libs.mongodb.client import Document, OperationFailure

Write = tuple[str, Document]
"""One write of an ``update`` or ``delete`` command, with the command's name."""


class StatementRefused(OperationFailure):
    """One write of a command was refused; code and details are those of the write.

    Args:
        statement: the index of the command in its round trip.
        write: the index of the write in its command.
    """

    def __init__(self, error: Document, statement: int) -> None:
        super().__init__(error.get("errmsg", ""), error.get("code"), error)
        self.statement = statement
        self.write = int(error.get("index", 0))


def replacement(document: Document) -> Write:
    """Replaces the document with the same ``_id``, or inserts it."""
    return update({"_id": document["_id"]}, document, upsert=True)


def update(criteria: Document, change: Document, *, upsert: bool = False) -> Write:
    return "update", {"q": criteria, "u": change, "upsert": upsert}


def removal(identifier: Any, **criteria: Any) -> Write:
    return "delete", {"q": {"_id": identifier, **criteria}, "limit": 1}


def write_commands(collection: str, writes: Iterable[Write]) -> list[Document]:
    """The writes in their order, in as few commands as that allows."""
    return [
        {name: collection, f"{name}s": [operation for _, operation in group]}
        for name, group in groupby(writes, key=lambda write: write[0])
    ]


def raise_for(reply: Document, statement: int = 0) -> None:
    """Raise the error in a reply, also that of a single write.

    Raises:
        StatementRefused: a write was refused; the first one that was.
        OperationFailure, NotPrimaryError: the command failed.
    """
    if reply.get("ok") == 1 and "writeErrors" not in reply and "writeConcernError" not in reply:
        return
    _check_command_response(reply, None, parse_write_concern_error=True)
    if refused := reply.get("writeErrors"):
        raise StatementRefused(refused[0], statement)
