"""Password hashes: argon2id on a few threads, so that many logins neither block the event loop nor exhaust memory.

The cost is the first recommendation of the OWASP Password Storage Cheat Sheet: 46 MiB, one pass, one lane.
"""

import asyncio
import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from argon2 import Parameters, PasswordHasher, Type
from argon2.exceptions import Argon2Error, InvalidHashError
from argon2.low_level import hash_secret_raw

from libs.core.errors import RetryLater
from libs.core.ids import random_base62

WAITING_MAX = 256
COST = Parameters(type=Type.ID, version=19, salt_len=16, hash_len=32, time_cost=1, memory_cost=46 * 1024, parallelism=1)

Result = TypeVar("Result")


class Passwords:
    """Hashes and verifies passwords; the threads are its own, one for each core and at most four."""

    def __init__(self, cost: Parameters = COST) -> None:
        self._hasher = PasswordHasher.from_parameters(cost)
        threads = min(4, os.cpu_count() or 1)
        self._threads = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="passwords")
        self._waiting = 0
        self._nobody_hash = self._hasher.hash(random_base62(32))

    def close(self) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)

    async def hash(self, password: str) -> str:
        """The salted hash to store; raises ``RetryLater`` if too many callers wait."""
        return await self._on_a_thread(lambda: self._hasher.hash(password))

    async def verify(self, stored_hash: str | None, password: str) -> bool:
        """Whether the password matches; an account that does not exist (None) takes the same time."""
        verified = await self._on_a_thread(lambda: self._verify(stored_hash or self._nobody_hash, password))
        return verified and stored_hash is not None

    async def fingerprint(self, password: str, salt: str) -> str:
        """A hash that identifies the password of a repeated request; as slow to attack as the password hash."""
        salt_bytes = hashlib.sha256(salt.encode()).digest()
        raw = await self._on_a_thread(lambda: self._raw(password, salt_bytes))
        return raw.hex()

    def _raw(self, password: str, salt: bytes) -> bytes:
        return hash_secret_raw(
            password.encode(),
            salt,
            time_cost=self._hasher.time_cost,
            memory_cost=self._hasher.memory_cost,
            parallelism=self._hasher.parallelism,
            hash_len=self._hasher.hash_len,
            type=self._hasher.type,
        )

    def _verify(self, stored_hash: str, password: str) -> bool:
        try:
            return self._hasher.verify(stored_hash, password)
        except (Argon2Error, InvalidHashError):
            return False

    async def _on_a_thread(self, work: Callable[[], Result]) -> Result:
        if self._waiting >= WAITING_MAX:
            raise RetryLater("too many logins are waiting", code="overloaded", retry_after_seconds=2)
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        finally:
            self._waiting -= 1
