"""Skips documents that cannot be read, and logs each of them once."""

from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, Generic, TypeVar

import structlog
from cronsim import CronSimError

from libs.core.decider import Aggregate, PureCodeFailed
from libs.core.entity import Entity
from libs.core.envelope import Frozen
from libs.core.errors import InvalidInput, NewerVersion
from libs.eventsourcing.entities import entity_of
from libs.mongodb.client import Document

State = TypeVar("State", bound=Frozen)

UNREADABLE = (PureCodeFailed, NewerVersion, KeyError, InvalidInput, CronSimError)
"""What a document raises that is damaged or was written by a newer version."""
REMEMBERED_MAX = 1_000

log = structlog.get_logger(__name__)


class Readable(Generic[State]):
    """The entities in documents of one kind."""

    def __init__(self, aggregate: Aggregate[State]) -> None:
        self._aggregate = aggregate
        self._known: set[Any] = set()

    async def entities(self, documents: AsyncIterator[Document]) -> AsyncGenerator[Entity[State], None]:
        """The readable ones, in order."""
        async for document in documents:
            try:
                entity = entity_of(self._aggregate, document)
            except UNREADABLE as error:
                self.report(document["_id"], error)
            else:
                yield entity

    def report(self, entity_id: Any, error: Exception) -> None:
        """Log that an entity is skipped, once per process."""
        if entity_id in self._known:
            return
        if len(self._known) < REMEMBERED_MAX:
            self._known.add(entity_id)
        log.error("document_unreadable", kind=self._aggregate.name, entity_id=entity_id, error=str(error)[:500])
