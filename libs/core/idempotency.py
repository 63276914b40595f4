"""The key under which a request takes effect at most once (``Idempotency-Key``)."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class IdempotencyKey:
    """Identifies a request that may be repeated.

    Args:
        id: a hash of principal, method, path and the client's key.
        request_hash: a hash of the body; the same id with another body is rejected.
    """

    id: str
    request_hash: str
