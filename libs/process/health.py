"""Whether this process should get requests."""

import asyncio
from collections.abc import Awaitable, Callable

Check = Callable[[], Awaitable[str | None]]


class Degraded(str):
    """A problem that does not keep this process from serving requests."""

    __slots__ = ()


class Health:
    """Whether this process should get requests: every check passes and it is not stopping."""

    def __init__(self) -> None:
        self._checks: dict[str, Check] = {}
        self._listeners: list[Callable[[], None]] = []
        self._draining = False
        self._stopping = False

    def add(self, name: str, check: Check) -> None:
        """Add a check that can not hang: it returns None, or the problem (``Degraded`` if requests can be served)."""
        self._checks[name] = check

    def drain(self) -> None:
        """Report not ready from now on, so that no new requests are sent here; those that come are served."""
        self._draining = True

    def stop(self) -> None:
        """Report not ready, and tell the listeners that the process stops."""
        if not self._stopping:
            self._draining = self._stopping = True
            for listener in self._listeners:
                listener()

    def on_stop(self, listener: Callable[[], None]) -> None:
        """Call ``listener`` when the process begins to stop, before requests in flight are waited for."""
        self._listeners.append(listener)

    @property
    def draining(self) -> bool:
        return self._draining

    @property
    def stopping(self) -> bool:
        return self._stopping

    async def report(self) -> dict[str, str | None]:
        """The problem that each check found, None where there is none."""
        names = list(self._checks)
        found = await asyncio.gather(*(self._run(self._checks[name]) for name in names))
        report = dict(zip(names, found, strict=True))
        return report | ({"shutdown": "the service is stopping"} if self._draining else {})

    @staticmethod
    async def _run(check: Check) -> str | None:
        try:
            return await check()
        except Exception as error:  # noqa: BLE001 - a broken check is a failed check
            return f"the check failed: {type(error).__name__}"
