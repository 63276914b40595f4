"""What the write path is asked for, and its reply."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from libs.core.decider import Act, Projection
from libs.core.entity import Entity
from libs.core.envelope import Envelope, Metadata
from libs.core.idempotency import IdempotencyKey
from libs.eventsourcing.batch import OffsetMove, SideWrite
from libs.mongodb.client import Document


@dataclass(frozen=True, slots=True)
class CommandRequest:
    """Commands that take effect together or not at all."""

    acts: Sequence[Act]
    metadata: Metadata
    side_writes: Sequence[SideWrite] = ()
    idempotency: IdempotencyKey | None = None


@dataclass(frozen=True, slots=True)
class ConsumerStep:
    """What a consumer writes in one transaction with its next offset."""

    offset: OffsetMove
    projections: Sequence[tuple[Projection, Envelope]] = ()
    acts: Sequence[tuple[Act, Metadata]] = ()
    side_writes: Sequence[SideWrite] = ()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a request did.

    Args:
        entities: one for each act, as it is after the act; None where an ignored refusal left no entity.
        replayed: an earlier request with the same Idempotency-Key had done it.
    """

    entities: Sequence[Entity[Any] | None]
    events: Sequence[Envelope] = ()
    replayed: bool = False


@dataclass(slots=True, eq=False)
class QueuedRequest:
    """A request of either kind from its arrival until its reply.

    Args:
        size_bytes: the memory that the texts of its commands take.
        decisions: how often it was decided in vain, because what it was decided on had changed.
        alone: it gets a batch of its own.
        result: how it ended; None while that is open, or when it waits for the next batch.
        replay: the record of the earlier request with its Idempotency-Key.
    """

    acts: Sequence[tuple[Act, Metadata]]
    projections: Sequence[tuple[Projection, Envelope]]
    offset: OffsetMove | None
    side_writes: Sequence[SideWrite]
    idempotency: IdempotencyKey | None
    future: "asyncio.Future[Outcome]"
    size_bytes: int = 0
    decisions: int = 0
    alone: bool = False
    result: Outcome | BaseException | None = None
    replay: Document | None = None
