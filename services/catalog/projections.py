"""This service's documents about jobs, which job_orchestrator owns."""

from typing import Any

from libs.contracts import jobs
from libs.core.decider import Projection
from libs.core.envelope import Envelope

RUN_STATES = {"completed": "completed", "failed": "failed", "cancelled": "canceled"}
"""A run's end in the words of the project family."""


def apply(document: dict[str, Any] | None, envelope: Envelope) -> dict[str, Any] | None:
    """A job as sources and destinations show it; None once it is deleted."""
    event = envelope.data
    if isinstance(event, jobs.JobDefined):
        before = document or {"project_id": envelope.metadata.project_id, "last_run_state": "", "last_run_time": None}
        return {
            **before,
            "name": event.name,
            "source_id": event.source_id,
            "destination_id": event.destination_id,
            "activate": event.activate,
            "streams_config_json": event.streams_config_json,
        }
    if document is None:
        return None
    match event:
        case jobs.JobActivated():
            return {**document, "activate": True}
        case jobs.JobDeactivated():
            return {**document, "activate": False}
        case jobs.JobRunRequested():
            return {**document, "last_run_state": "running", "last_run_time": envelope.time}
        case jobs.JobRunEnded():
            return {**document, "last_run_state": RUN_STATES[event.outcome]}
        case jobs.JobDeleted():
            return None
        case _:
            return document


JOBS = Projection(collection="jobs", topic=jobs.TOPIC, key=lambda envelope: int(envelope.entity_id), apply=apply)
