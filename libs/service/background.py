"""Long-running work of a service: restarted with backoff when it fails, cancelled at shutdown."""

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from libs.mongodb.client import PyMongoError, in_short, is_passing

BACKOFF_SECONDS_MIN = 0.05
BACKOFF_SECONDS_MAX = 10.0
FAILURES_MAX = 3

log = structlog.get_logger(__name__)


class BackgroundTasks:
    """The background tasks of one service."""

    def __init__(self) -> None:
        self._tasks: list[asyncio.Task[None]] = []
        self._failing: dict[str, str] = {}
        self._closing = False

    def start(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        """Run ``work``; when it raises, run it again after a delay that grows from 50 ms to 10 s."""
        self._tasks.append(asyncio.create_task(self._supervise(name, work), name=name))

    async def close(self) -> None:
        """Cancel the tasks, the newest first, and wait for each."""
        self._closing = True
        for task in reversed(self._tasks):
            task.cancel()
            await asyncio.wait({task})
        self._tasks.clear()

    async def problem(self) -> str | None:
        """Which of them keep failing, if any."""
        return "; ".join(f"{name} keeps failing: {error}" for name, error in self._failing.items()) or None

    async def _supervise(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        delay_seconds, failures = BACKOFF_SECONDS_MIN, 0
        loop = asyncio.get_running_loop()
        while True:
            recovering = loop.call_later(BACKOFF_SECONDS_MAX, self._failing.pop, name, None)
            started_at = loop.time()
            try:
                await work()
                return
            except Exception as error:  # noqa: BLE001
                failures = 1 if loop.time() - started_at > BACKOFF_SECONDS_MAX else failures + 1
                _report(name, error, failures)
                # A store that does not answer is reported by its own check.
                if failures >= FAILURES_MAX and not isinstance(error, PyMongoError):
                    self._failing[name] = repr(error)[:200]
            finally:
                recovering.cancel()
            if self._closing:
                # It answered its cancellation with an error, and must not be started again.
                return
            delay_seconds = BACKOFF_SECONDS_MIN if failures == 1 else min(BACKOFF_SECONDS_MAX, delay_seconds * 2)
            await asyncio.sleep(delay_seconds)


def _report(task: str, error: Exception, failures: int) -> None:
    if isinstance(error, ConnectionError) or is_passing(error):
        # An unreachable server is no defect of the code, and a traceback per attempt would hide those that are.
        report = log.warning if failures == 1 else log.debug
        report("background_task_failed", task=task, error=in_short(error))
    else:
        log.warning("background_task_failed", task=task, error=repr(error), exc_info=error)
