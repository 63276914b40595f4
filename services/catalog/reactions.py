"""Jobs' events as commands on the connections that they use: confirm or release the reference."""

from collections.abc import Sequence

from libs.contracts import jobs
from libs.core.decider import Act, Reaction
from libs.core.envelope import Envelope
from services.catalog.domain.connection import Command, Confirm, Release
from services.catalog.domain.destination import DESTINATION
from services.catalog.domain.source import SOURCE


def react(envelope: Envelope) -> Sequence[Act]:
    """A refusal means that the connection was deleted, and its references with it."""
    event = envelope.data
    job_id = int(envelope.entity_id)
    match event:
        case jobs.JobCreated():
            return _confirmed(job_id, event, envelope)
        case jobs.JobUpdated():
            released = _acts(event.previous_source_id, event.previous_destination_id, Release(job_id, envelope.time))
            return [*_confirmed(job_id, event, envelope), *released]
        case jobs.JobDeleted():
            return _acts(event.source_id, event.destination_id, Release(job_id, envelope.time))
        case _:
            return ()


def _confirmed(job_id: int, event: jobs.JobDefined, envelope: Envelope) -> Sequence[Act]:
    return _acts(event.source_id, event.destination_id, Confirm(job_id, event.name, envelope.time))


def _acts(source_id: int | None, destination_id: int | None, command: Command) -> Sequence[Act]:
    places = ((SOURCE, source_id), (DESTINATION, destination_id))
    return [
        Act(aggregate, identifier, command, ignore_refusal=True)
        for aggregate, identifier in places
        if identifier is not None
    ]


JOBS_REACTION = Reaction(topic=jobs.TOPIC, react=react)
