"""Waiting for a condition, never for a time."""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import datetime

from libs.core.clock import SystemClock

POLL_SECONDS = 0.02


async def until(condition: Callable[[], Awaitable[bool]], timeout_seconds: float = 30.0) -> None:
    """Poll until the condition holds; raises ``TimeoutError``."""
    async with asyncio.timeout(timeout_seconds):
        while not await condition():
            await asyncio.sleep(POLL_SECONDS)


async def until_after(moment: datetime | None = None) -> None:
    """Wait until the clock has passed a moment, by default the present one, so that what follows has a later time."""
    clock = SystemClock()
    before = moment or clock.now()
    while clock.now() <= before:
        await asyncio.sleep(0)
