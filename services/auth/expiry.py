"""Announces once, by an event on its stream, that a key is about to expire."""

import asyncio

from libs.core.clock import Clock
from libs.core.envelope import Metadata
from libs.core.ids import uuid7
from libs.eventsourcing.command_handler import CommandHandler
from services.auth.domain.api_key import API_KEY, WARNED_BEFORE, AnnounceExpiry
from services.auth.queries import AuthQueries

LOOK_EVERY_SECONDS = 60.0
ANNOUNCED_AT_ONCE_MAX = 200


class ExpiryAnnouncer:
    """Finds keys that expire soon; each key's stream decides whether that was announced already."""

    def __init__(self, commands: CommandHandler, queries: AuthQueries, clock: Clock) -> None:
        self._commands = commands
        self._queries = queries
        self._clock = clock

    async def run(self) -> None:
        """Look every minute until cancelled."""
        while True:
            announced = await self.announce()
            if announced < ANNOUNCED_AT_ONCE_MAX:
                await asyncio.sleep(LOOK_EVERY_SECONDS)

    async def announce(self) -> int:
        """Announce one portion; returns how many keys were found."""
        now = self._clock.now()
        found = await self._queries.expiring_keys(now, now + WARNED_BEFORE, ANNOUNCED_AT_ONCE_MAX)
        await asyncio.gather(*(self._announce(key_id, project_id) for key_id, project_id in found))
        return len(found)

    async def _announce(self, key_id: str, project_id: int) -> None:
        metadata = Metadata(project_id=project_id, correlation_id=uuid7())
        await self._commands.handle(API_KEY, key_id, AnnounceExpiry(self._clock.now()), metadata)
