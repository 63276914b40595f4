"""Sessions: what a login opens and a logout ends. Plain documents with a TTL, known by the SHA-256 of their token."""

from dataclasses import dataclass
from datetime import datetime, timedelta

from libs.core.clock import Clock
from libs.core.entity import Entity
from libs.eventsourcing.batch import SideWrite
from libs.eventsourcing.documents import Documents
from libs.mongodb.client import Document
from services.auth.domain.user import User
from services.auth.queries import KNOWN_ADDRESSES, SESSIONS
from services.auth.tokens import new_session_token, token_hash

RENEW_AFTER_PART = 0.01


@dataclass(frozen=True, slots=True)
class Session:
    """A session that has not ended.

    Args:
        id: the token's SHA-256.
        password_version: of the user when it was opened; void once the user's is another.
    """

    id: str
    user_id: int
    password_version: int
    opened_at: datetime
    expires_at: datetime


class Sessions:
    """Opens, finds and ends sessions.

    Args:
        ttl_seconds: a session ends when it was not used for this long.
    """

    def __init__(self, documents: Documents, clock: Clock, ttl_seconds: float) -> None:
        self._documents = documents
        self._clock = clock
        self.ttl_seconds = ttl_seconds

    async def open(self, user: Entity[User]) -> str:
        """Open a session; returns its token, which is not stored."""
        token = new_session_token()
        document = self._document(token_hash(token), int(user.id), user.state.password_version)
        await self._documents.plain(SESSIONS).insert_one(document)
        return token

    async def note_address(self, user_id: int, address: str) -> None:
        """Remember the address of a login, for as long as an unused session lasts."""
        await self._documents.plain(KNOWN_ADDRESSES).update_one(
            {"_id": {"user_id": user_id, "address": address}}, {"$set": {"expires_at": self._expiry()}}, upsert=True
        )

    async def knows_address(self, user_id: int, address: str) -> bool:
        """Whether the user recently logged in from this address."""
        known = {"_id": {"user_id": user_id, "address": address}, "expires_at": {"$gt": self._clock.now()}}
        return await self._documents.plain(KNOWN_ADDRESSES).find_one(known) is not None

    async def find(self, token: str) -> Session | None:
        """The session of a token, None when it is unknown or has ended."""
        found = await self._documents.document(SESSIONS, token_hash(token))
        if found is None or found["expires_at"] <= self._clock.now():
            return None
        return Session(
            found["_id"], found["user_id"], found["password_version"], found["opened_at"], found["expires_at"]
        )

    async def end(self, token: str) -> None:
        """End a session, if it exists."""
        await self._documents.plain(SESSIONS).delete_one({"_id": token_hash(token)})

    def is_to_renew(self, session: Session) -> bool:
        """Whether enough time has passed that extending the session is worth a write."""
        remaining_seconds = (session.expires_at - self._clock.now()).total_seconds()
        return remaining_seconds < self.ttl_seconds * (1 - RENEW_AFTER_PART)

    def renewal(self) -> Document:
        """The update that extends a session to its full time to live from now."""
        return {"$max": {"expires_at": self._expiry()}}

    def carried_over(self, token: str, user_id: int, password_version: int) -> SideWrite:
        """Written with a change of the password, so that the session that changed it continues."""
        session_id = token_hash(token)
        return SideWrite(SESSIONS, session_id, self._document(session_id, user_id, password_version))

    def _document(self, session_id: str, user_id: int, password_version: int) -> Document:
        return {
            "_id": session_id,
            "user_id": user_id,
            "password_version": password_version,
            "opened_at": self._clock.now(),
            "expires_at": self._expiry(),
        }

    def _expiry(self) -> datetime:
        return self._clock.now() + timedelta(seconds=self.ttl_seconds)
