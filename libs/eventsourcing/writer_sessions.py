"""The logical sessions of those who lock the head, by name, so that a process that died or hangs can be ended.

Killing a session aborts its transaction, whose locks would otherwise be held until the transaction expires.
"""

from typing import Any

from libs.mongodb.client import Document, SyncDatabase

SWAP = "swap"
"""The name of a rebuild's swap; every other name is a process's ``INSTANCE``."""


class WriterSessions:
    """One store's registered sessions. All methods block.

    Args:
        database: the service's database.
    """

    def __init__(self, database: SyncDatabase[Document]) -> None:
        self._client = database.client
        self._writers = database["writers"]

    def register(self, name: str, session_id: Any) -> None:
        self._writers.replace_one({"_id": name}, {"session": session_id}, upsert=True)

    def remove(self, name: str) -> None:
        self._writers.delete_one({"_id": name})

    def kill(self, name: str) -> bool:
        """Kill the session of that name; False if there is none."""
        writer = self._writers.find_one({"_id": name})
        if writer is None:
            return False
        self._client.admin.command({"killSessions": [{"id": writer["session"]}]})
        return True
