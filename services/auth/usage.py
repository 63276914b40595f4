"""When sessions and keys were last used: collected in memory, written together every few seconds.

What a crash loses is some seconds of these notes: a session ends that much earlier, a counter stays that much lower.
"""

import asyncio
from collections import Counter
from datetime import datetime, timedelta

import structlog

from libs.core.clock import Clock
from libs.eventsourcing.documents import Documents
from libs.mongodb.client import PyMongoError, UpdateOne
from services.auth.queries import KEY_USAGE, SESSIONS
from services.auth.sessions import Sessions

FLUSH_EVERY_SECONDS = 5.0
NOTES_MAX = 50_000
KEPT_DAYS = 400

log = structlog.get_logger(__name__)


class Usage:
    """Collects uses and writes them in bulk."""

    def __init__(self, documents: Documents, sessions: Sessions, clock: Clock) -> None:
        self._documents = documents
        self._sessions = sessions
        self._clock = clock
        self._renewed: set[str] = set()
        self._uses: Counter[str] = Counter()
        self._last_used: dict[str, datetime] = {}

    def note_session(self, session_id: str) -> None:
        if len(self._renewed) < NOTES_MAX:
            self._renewed.add(session_id)

    def note_key(self, key_id: str) -> None:
        if len(self._uses) < NOTES_MAX or key_id in self._uses:
            self._uses[key_id] += 1
            self._last_used[key_id] = self._clock.now()

    async def run(self) -> None:
        """Write the notes every few seconds until cancelled."""
        while True:
            await asyncio.sleep(FLUSH_EVERY_SECONDS)
            await self.flush()

    async def close(self) -> None:
        """Write what is left, unless the store can't be reached."""
        try:
            await self.flush()
        except PyMongoError as error:
            log.warning("usage_not_written", error=type(error).__name__)

    async def flush(self) -> None:
        """Write what was noted so far."""
        renewed, self._renewed = self._renewed, set()
        uses, self._uses = self._uses, Counter()
        last_used, self._last_used = self._last_used, {}
        if renewed:
            # No upsert: a session that was ended meanwhile stays ended.
            renewals = [UpdateOne({"_id": session_id}, self._sessions.renewal()) for session_id in renewed]
            await self._documents.plain(SESSIONS).bulk_write(renewals, ordered=False)
        if uses:
            counts = [self._count(key_id, count, last_used[key_id]) for key_id, count in uses.items()]
            await self._documents.plain(KEY_USAGE).bulk_write(counts, ordered=False)

    def _count(self, key_id: str, count: int, used_at: datetime) -> UpdateOne:
        kept_until = used_at + timedelta(days=KEPT_DAYS)
        changes = {"$inc": {"uses": count}, "$max": {"last_used_at": used_at, "expires_at": kept_until}}
        return UpdateOne({"_id": key_id}, changes, upsert=True)
