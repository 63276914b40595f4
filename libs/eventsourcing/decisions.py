"""How the requests of a batch are decided: in order, each on what those before it left. Nothing is written here."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from libs.core.decider import PureCodeFailed
from libs.core.errors import FixRequest, NewerVersion, Unprocessable
from libs.eventsourcing.batch import Batch, OffsetMoved
from libs.eventsourcing.head import Head
from libs.eventsourcing.request_draft import Changes, MustWait, RequestDraft, text_size
from libs.eventsourcing.requests import Outcome, QueuedRequest
from libs.eventsourcing.view import UniqueKey, View
from libs.mongodb.client import Document

DOCUMENTS_MAX = 1_000
BATCH_BYTES_MAX = 8 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Decisions:
    """What a batch of requests was decided to be; the requests that are done have their ``result``.

    Args:
        later: the requests that wait for the next batch.
        claimed: the unique keys that the batch takes, and the first entity that asked for each.
    """

    batch: Batch
    later: Sequence[QueuedRequest]
    claimed: dict[UniqueKey, int | str]


def decide(requests: Sequence[QueuedRequest], view: View, head: Head, now: datetime) -> Decisions:
    """Decide requests in order. Deciding the same requests again replaces their results."""
    decider = _BatchDecider(view, head, now)
    for request in requests:
        decider.decide(request)
    return Decisions(decider.batch(), decider.later, decider.changes.claimed)


class _BatchDecider:
    """One pass through the requests of a batch."""

    def __init__(self, view: View, head: Head, now: datetime) -> None:
        self._view = view
        self._head = head
        self._now = now
        self._accepted: list[tuple[QueuedRequest, Outcome]] = []
        self._idempotency_ids: set[str] = set()
        self._documents = 0
        self._size_bytes = 0
        self.changes = Changes()
        self.later: list[QueuedRequest] = []

    def decide(self, request: QueuedRequest) -> None:
        """Set the request's result, or let it wait for the next batch."""
        request.result = None
        if self._accepted and self._is_full():
            self.later.append(request)
            return
        try:
            request.result = self._replayed(request) or self._accepted_outcome(request)
        except MustWait:
            self.later.append(request)
        except (FixRequest, NewerVersion, OffsetMoved, PureCodeFailed) as refusal:
            request.result = refusal

    def batch(self) -> Batch:
        """What the accepted requests write together."""
        batch = Batch(self._head.collections, self._head.newer_types, lists=self.changes.lists)
        for request, outcome in self._accepted:
            batch.events += outcome.events
            batch.side_writes += request.side_writes
            if request.offset is not None:
                batch.offsets.append(request.offset)
            if request.idempotency is not None:
                batch.idempotency.append(self._idempotency_record(request, outcome))
        batch.kinds = frozenset(event.versioned_type() for event in {type(envelope.data) for envelope in batch.events})
        self._add_entities(batch)
        self._add_projected(batch)
        return batch

    def _is_full(self) -> bool:
        return self._size_bytes >= BATCH_BYTES_MAX or self._documents >= DOCUMENTS_MAX

    def _replayed(self, request: QueuedRequest) -> Outcome | None:
        """The reply to a request that was done before; None for a new one."""
        key = request.idempotency
        if key is None:
            return None
        if key.id in self._idempotency_ids:
            raise MustWait
        record = self._view.idempotency.get(key.id)
        if record is None:
            return None
        if record["request_hash"] != key.request_hash:
            raise Unprocessable("this Idempotency-Key was used with another request")
        request.replay = record
        return Outcome((), replayed=True)

    def _accepted_outcome(self, request: QueuedRequest) -> Outcome:
        move = request.offset
        if move is not None and self._view.offsets.get(move.key, 0) != move.expected_offset:
            raise OffsetMoved(move.key)
        draft = RequestDraft(request, self.changes, self._view, self._head.store_id, self._now)
        outcome = draft.decide()
        self.changes.add(draft.changes)
        self._accepted.append((request, outcome))
        if request.idempotency is not None:
            self._idempotency_ids.add(request.idempotency.id)
        self._documents += len(outcome.events) * 2 + len(request.side_writes) + len(request.projections)
        self._size_bytes += draft.size_bytes()
        self._size_bytes += sum(text_size(write.document) for write in request.side_writes if write.document)
        return outcome

    def _idempotency_record(self, request: QueuedRequest, outcome: Outcome) -> Document:
        assert request.idempotency is not None
        entities = [
            {"aggregate": act.aggregate.name, "id": entity.id, "version": entity.version}
            for (act, _), entity in zip(request.acts, outcome.entities, strict=True)
            if entity is not None
        ]
        return {
            "_id": request.idempotency.id,
            "request_hash": request.idempotency.request_hash,
            "entities": entities,
            "created_at": self._now,
        }

    def _add_entities(self, batch: Batch) -> None:
        for (collection, identifier), known in self.changes.entities.items():
            document = known.document(identifier)
            if known.listing is not None and known.number is not None and known.number < 0:
                batch.lists[known.listing.collection].documents.append((document, known.number))
            is_new = (collection, identifier) not in self._view.entities
            (batch.inserts if is_new else batch.replacements).setdefault(collection, []).append(document)

    def _add_projected(self, batch: Batch) -> None:
        for (collection, identifier), document in self.changes.documents.items():
            if document is None:
                batch.removals.setdefault(collection, []).append(identifier)
            else:
                batch.replacements.setdefault(collection, []).append({**document, "_id": identifier})
