"""How far each stream of a job has been read, as the runs report it.

This copy is for people. The state that runs go on from stands at the destination and is committed with the rows.
"""

from collections.abc import Iterable, Sequence
from datetime import datetime

from libs.contracts.runs import StreamResult
from libs.contracts.streams import StreamKey
from libs.core.envelope import Frozen
from libs.eventsourcing.batch import SideWrite
from libs.eventsourcing.documents import Documents
from libs.mongodb.client import ASCENDING, Document, IndexModel

STREAM_STATES = "stream_states"
STREAM_STATES_INDEXES = [IndexModel([("job_id", ASCENDING), ("namespace", ASCENDING), ("name", ASCENDING)])]


class KnownState(Frozen):
    """What a run reported of a stream.

    Args:
        position: in words.
        run_id: the run that committed it.
    """

    namespace: str
    name: str
    position: str
    run_id: str
    reported_at: datetime


def states_reported(job_id: int, run_id: str, results: Iterable[StreamResult], now: datetime) -> list[SideWrite]:
    """What is to be kept of a run's results."""
    return [
        SideWrite(
            STREAM_STATES,
            _id(job_id, (result.namespace, result.name)),
            {
                "job_id": job_id,
                "namespace": result.namespace,
                "name": result.name,
                "position": result.position,
                "run_id": run_id,
                "reported_at": now,
            },
        )
        for result in results
        if result.position is not None
    ]


async def states_of(documents: Documents, job_id: int) -> list[KnownState]:
    """The states of a job's streams, by namespace and name."""
    found = documents.plain(STREAM_STATES).find({"job_id": job_id}).sort([("namespace", 1), ("name", 1)])
    return [KnownState.model_validate(document, extra="ignore") async for document in found]


async def forget_states(documents: Documents, job_id: int, streams: Sequence[StreamKey] | None) -> None:
    """Remove the states of streams whose target was cleared; None for all."""
    chosen: Document = {} if streams is None else {"_id": {"$in": [_id(job_id, stream) for stream in streams]}}
    await documents.plain(STREAM_STATES).delete_many({"job_id": job_id, **chosen})


def _id(job_id: int, stream: StreamKey) -> str:
    return f"{job_id}/{len(stream[0])}/{stream[0]}/{stream[1]}"
