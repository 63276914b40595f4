"""The services that a run talks to, as the worker sees them: they keep what they are told, answer as they are set."""

import asyncio
from dataclasses import dataclass, field
from typing import Any, TypeVar

from libs.contracts.internal import (
    CLAIM_WORK,
    FINISH_WORK,
    HEARTBEAT,
    RESOLVE_ENDPOINTS,
    ClaimedRun,
    EndpointResolved,
    EndpointsResolved,
    FinishAnswer,
    FinishWork,
    Heartbeat,
    HeartbeatAnswer,
    InternalCall,
    LogLine,
    WorkClaim,
)
from libs.core.clock import SystemClock
from libs.core.envelope import Frozen
from libs.core.errors import RetryLater
from services.worker.attempt import Attempt, Outcome
from services.worker.run import RunExecutor

RequestT = TypeVar("RequestT", bound=Frozen)
ResponseT = TypeVar("ResponseT", bound=Frozen)


@dataclass
class Orchestra:
    """Answers the calls of one run.

    Args:
        verdict: what heartbeats are answered.
        deaf_finishes: how many reports of the end are lost before one arrives.
        away: how often catalog can't be reached.
        fences_the_end: the report of the end is refused, whatever heartbeats are answered.
    """

    source: dict[str, Any]
    destination_type: str
    destination: dict[str, Any]
    verdict: str = "continue"
    deaf_finishes: int = 0
    away: int = 0
    fences_the_end: bool = False
    waiting: list[ClaimedRun] = field(default_factory=list)
    heartbeats: list[Heartbeat] = field(default_factory=list)
    grants: list[str] = field(default_factory=list)
    finished: list[FinishWork] = field(default_factory=list)
    logs: dict[tuple[str, int], dict[int, LogLine]] = field(default_factory=dict)
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    async def call(self, call: InternalCall[RequestT, ResponseT], request: RequestT) -> ResponseT:
        answer = self._answer(call, request)
        assert isinstance(answer, call.response)
        return answer

    def _answer(self, call: InternalCall[Any, Any], request: Any) -> Frozen:
        if call is CLAIM_WORK:
            return WorkClaim(run=self.waiting.pop(0).model_dump() if self.waiting else None)
        if call is RESOLVE_ENDPOINTS:
            self.grants.append(request.grant)
            if self.away:
                self.away -= 1
                raise RetryLater("catalog can't be reached")
            return EndpointsResolved(
                source=EndpointResolved(id=1, type="postgres", version="v1.0.0", config=self.source),
                destination=EndpointResolved(
                    id=2, type=self.destination_type, version="v1.0.0", config=self.destination
                ),
            )
        if call is HEARTBEAT:
            self.heartbeats.append(request)
            self._keep(request)
            return HeartbeatAnswer.model_validate({"verdict": self.verdict})
        assert call is FINISH_WORK
        if self.deaf_finishes:
            self.deaf_finishes -= 1
            raise RetryLater("job_orchestrator can't be reached")
        self.finished.append(request)
        self._keep(request)
        self.ended.set()
        return FinishAnswer(verdict="fenced" if self.fences_the_end or self.verdict == "fenced" else "recorded")

    def _keep(self, report: Heartbeat | FinishWork) -> None:
        log = self.logs.setdefault((report.run_id, report.epoch), {})
        for number, line in enumerate(report.log_lines, report.log_sequence):
            assert log.setdefault(number, line) == line, "a number never gets another line"

    @property
    def log(self) -> dict[int, LogLine]:
        """Of the last attempt that reported."""
        return list(self.logs.values())[-1] if self.logs else {}

    @property
    def messages(self) -> list[str]:
        assert sorted(self.log) == list(range(len(self.log))), "no line is missing"
        return [self.log[number].message for number in sorted(self.log)]

    def run(self, run_id: str = "run-1", epoch: int = 1, **changes: Any) -> ClaimedRun:
        fields = {
            "run_id": run_id,
            "job_id": 7,
            "project_id": 123,
            "kind": "sync",
            "epoch": epoch,
            "lease_seconds": 15,
            "grant": "grant",
            "streams_config_json": "{}",
            "advanced_settings_json": '{"verify": true}',
        }
        return ClaimedRun.model_validate(fields | changes)

    async def execute(
        self, run: ClaimedRun | None = None, *, heartbeat_seconds: float = 0.05, **limits: Any
    ) -> Outcome:
        claimed = run or self.run()
        executor, attempt = RunExecutor(self, **limits), Attempt(claimed, self, SystemClock(), heartbeat_seconds)
        return await attempt.run(lambda: executor.execute(claimed, attempt))
