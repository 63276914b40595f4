"""What auth says about a credential, cached for less than a second.

An answer is used for 800 ms from the moment when it was requested, so that a revocation takes effect within a second
whatever else fails. From 400 ms on a use refreshes it in the background, so that a busy key never waits. Concurrent
requests with one credential share one look-up.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import structlog

from libs.contracts.internal import CredentialResolved

USED_SECONDS = 0.8
REFRESHED_SECONDS = 0.4
CACHED_MAX = 10_000

log = structlog.get_logger(__name__)


class Credential(NamedTuple):
    """A credential as it was presented: in ``Authorization`` or as a session's cookie."""

    kind: Literal["bearer", "session"]
    text: str


@dataclass(frozen=True, slots=True)
class _Answer:
    resolved: CredentialResolved
    requested_at: float


class CredentialCache:
    """Looks credentials up.

    Args:
        look_up: asks auth.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        look_up: Callable[[Credential], Awaitable[CredentialResolved]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._look_up = look_up
        self._clock = clock
        self._answers: dict[Credential, _Answer] = {}
        self._pending: dict[Credential, asyncio.Task[_Answer]] = {}
        self._tasks: set[asyncio.Task[_Answer]] = set()

    async def close(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def forget(self) -> None:
        """Look everything up again, as auth has just been told something that may change any answer."""
        self._answers.clear()
        self._pending.clear()

    def was_valid(self, credential: Credential) -> bool:
        """Whether the latest answer said that it is valid, however old that answer is."""
        answer = self._answers.get(credential)
        return answer is not None and answer.resolved.principal is not None

    async def resolve(self, credential: Credential) -> CredentialResolved:
        """What auth says; raises what the look-up raises."""
        arrived_at = self._clock()
        answer = self._answers.get(credential)
        if answer is not None and (age_seconds := arrived_at - answer.requested_at) < USED_SECONDS:
            if age_seconds >= REFRESHED_SECONDS:
                self._request(credential)
            return answer.resolved
        answer = await asyncio.shield(self._request(credential))
        if answer.requested_at < arrived_at and self._clock() - answer.requested_at >= USED_SECONDS:
            # A slow answer to an earlier request may be from before a revocation.
            answer = await asyncio.shield(self._request(credential))
        return answer.resolved

    def _request(self, credential: Credential) -> asyncio.Task[_Answer]:
        task = self._pending.get(credential)
        if task is None:
            task = asyncio.get_running_loop().create_task(self._fetch(credential), name="resolve-credential")
            self._pending[credential] = task
            self._tasks.add(task)
            task.add_done_callback(lambda task: self._done(credential, task))
        return task

    async def _fetch(self, credential: Credential) -> _Answer:
        requested_at = self._clock()
        answer = _Answer(await self._look_up(credential), requested_at)
        if self._pending.get(credential) is asyncio.current_task():
            if len(self._answers) >= CACHED_MAX:
                self._drop_old(requested_at)
            self._answers[credential] = answer
        return answer

    def _done(self, credential: Credential, task: asyncio.Task[_Answer]) -> None:
        self._tasks.discard(task)
        if self._pending.get(credential) is task:
            del self._pending[credential]
        # Requests that wait get the error. After a refresh in the background the next request looks up again.
        if not task.cancelled() and (error := task.exception()) is not None:
            log.warning("credential_not_resolved", error=str(error))

    def _drop_old(self, now: float) -> None:
        """Drop the answers that are too old to be used, and all of them if that was not enough."""
        self._answers = {
            credential: answer
            for credential, answer in self._answers.items()
            if now - answer.requested_at < USED_SECONDS
        }
        if len(self._answers) >= CACHED_MAX:
            self._answers.clear()
