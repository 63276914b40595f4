"""The claiming loop with a kind of work that only exists here: nothing in the loop or in an attempt knows of runs."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import pytest

from libs.contracts.internal import (
    CLAIM_WORK,
    FINISH_WORK,
    HEARTBEAT,
    Claimed,
    ClaimWork,
    FinishAnswer,
    FinishWork,
    HeartbeatAnswer,
    InternalCall,
    WorkClaim,
)
from libs.core.clock import ManualClock
from libs.core.envelope import Event, Frozen
from libs.core.errors import InvalidInput, RetryLater
from libs.process.live import Live
from libs.process.telemetry import REGISTRY
from services.worker.attempt import Attempt
from services.worker.claiming import Claiming, WorkKind
from services.worker.config import WorkerSettings

RequestT = TypeVar("RequestT", bound=Frozen)
ResponseT = TypeVar("ResponseT", bound=Frozen)


class NapQueued(Event):
    TYPE = "nap_queued"
    TOPIC = "naps"


class ClaimedNap(Claimed):
    place: str


@dataclass
class Bed:
    """Executes naps: a nap lasts until it is woken, or raises what the test wants."""

    begun: asyncio.Queue[ClaimedNap] = field(default_factory=asyncio.Queue)
    woken: asyncio.Event = field(default_factory=asyncio.Event)
    error: Exception | None = None

    async def execute(self, nap: ClaimedNap, attempt: Attempt) -> None:
        attempt.report.log("info", f"napping on the {nap.place}")
        await self.begun.put(nap)
        if self.error is not None:
            raise self.error
        await self.woken.wait()


@dataclass
class Office:
    """Hands out the naps that wait, and stores what it is sent."""

    waiting: deque[dict[str, Any]]
    verdict: Literal["continue", "cancel", "fenced"] = "continue"
    claims: list[ClaimWork] = field(default_factory=list)
    finished: asyncio.Queue[FinishWork] = field(default_factory=asyncio.Queue)
    asked_again: asyncio.Event = field(default_factory=asyncio.Event)

    async def call(self, call: InternalCall[RequestT, ResponseT], request: RequestT) -> ResponseT:
        answer = self._answer(call, request)
        assert isinstance(answer, call.response)
        return answer

    def _answer(self, call: InternalCall[Any, Any], request: Any) -> Frozen:
        if call is CLAIM_WORK:
            self.claims.append(request)
            if self.waiting:
                return WorkClaim(kind="nap", run=self.waiting.popleft())
            self.asked_again.set()
            return WorkClaim()
        if call is HEARTBEAT:
            return HeartbeatAnswer(verdict=self.verdict)
        assert call is FINISH_WORK
        self.finished.put_nowait(request)
        return FinishAnswer(verdict="recorded")


def nap(place: str = "couch", **changes: Any) -> dict[str, Any]:
    return {
        "run_id": f"nap-{place}",
        "epoch": 3,
        "lease_seconds": 15,
        "place": place,
        "a field of tomorrow": 1,
    } | changes


@asynccontextmanager
async def claiming(office: Office, bed: Bed) -> AsyncIterator["asyncio.Task[None]"]:
    settings = WorkerSettings(worker_poll_seconds=Live(0.01), worker_heartbeat_seconds=0.01, worker_runs_max=1)
    kinds = {"nap": WorkKind(ClaimedNap, bed.execute, NapQueued)}
    loop = asyncio.create_task(Claiming(settings, office, ManualClock(), "worker-1", kinds).run())
    try:
        async with asyncio.timeout(10):
            yield loop
    finally:
        loop.cancel()
        await asyncio.wait({loop})


def ended(outcome: str) -> float:
    return REGISTRY.get_sample_value("datasync_work_ended_total", {"kind": "nap", "outcome": outcome}) or 0.0


async def test_work_of_a_new_kind_is_claimed_by_name_executed_and_finished() -> None:
    office, bed, before = Office(deque([nap("couch"), nap("rug")])), Bed(), ended("completed")
    bed.woken.set()
    async with claiming(office, bed):
        ends = [await office.finished.get(), await office.finished.get()]
        await office.asked_again.wait()
    assert {claim.kinds for claim in office.claims} == {("nap",)}
    assert [bed.begun.get_nowait().place for _ in ends] == ["couch", "rug"]
    assert [(end.run_id, end.epoch, end.outcome) for end in ends] == [
        ("nap-couch", 3, "completed"),
        ("nap-rug", 3, "completed"),
    ]
    assert ended("completed") == before + 2


@pytest.mark.parametrize(
    ("error", "retryable", "text"),
    [
        (InvalidInput("the couch is taken"), False, "the couch is taken"),
        (RetryLater("too loud"), True, "too loud"),
        (ZeroDivisionError(), True, "internal error: ZeroDivisionError"),
    ],
)
async def test_what_it_raises_is_its_failure(error: Exception, retryable: bool, text: str) -> None:
    office, bed = Office(deque([nap()])), Bed(error=error)
    async with claiming(office, bed):
        end = await office.finished.get()
    assert (end.outcome, end.retryable, end.error) == ("failed", retryable, text)


async def test_it_is_cancelled_by_the_answer_to_a_heartbeat() -> None:
    office, bed = Office(deque([nap()])), Bed()
    async with claiming(office, bed):
        await bed.begun.get()
        office.verdict = "cancel"
        assert (await office.finished.get()).outcome == "cancelled"


async def test_it_is_not_begun_if_it_was_cancelled_before_it_was_claimed() -> None:
    office, bed = Office(deque([nap(cancel_requested=True)])), Bed()
    async with claiming(office, bed):
        assert (await office.finished.get()).outcome == "cancelled"
    assert bed.begun.empty()


async def test_fenced_work_stops_and_reports_no_end() -> None:
    office, bed, before = Office(deque([nap()])), Bed(), ended("fenced")
    async with claiming(office, bed):
        await bed.begun.get()
        office.verdict = "fenced"
        await office.asked_again.wait()
    assert office.finished.empty()
    assert ended("fenced") == before + 1


async def test_it_is_given_back_when_the_worker_stops() -> None:
    office, bed, before = Office(deque([nap()])), Bed(), ended("given_back")
    async with claiming(office, bed) as loop:
        await bed.begun.get()
        loop.cancel()
        end = await office.finished.get()
    assert (end.outcome, end.given_back, end.retryable) == ("failed", True, True)
    assert ended("given_back") == before + 1


async def test_a_claim_that_can_not_be_read_does_not_stop_the_loop() -> None:
    office, bed = Office(deque([nap() | {"place": 7}, nap("rug")])), Bed()
    bed.woken.set()
    async with claiming(office, bed):
        assert (await office.finished.get()).run_id == "nap-rug"
