"""Every error that a caller can meet, grouped by what the caller can do about it.

``FixRequest``: change the request. ``RetryLater``: send the same request again. ``CallOperator``: somebody has to
look. Each carries an HTTP status, a stable machine-readable ``code``, a message for people and, where it applies, the
fields at fault. The HTTP shell turns them into the error shape of the API family that was called.
"""

from collections.abc import Sequence
from dataclasses import dataclass


def first_error(error: BaseException) -> BaseException:
    """The error itself, or the first of a group that parallel tasks raised."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


@dataclass(frozen=True, slots=True)
class FieldError:
    """One field at fault: ``field`` is a dotted path such as ``source.config.port``."""

    field: str
    message: str
    code: str = "invalid"


class DataSyncError(Exception):
    """The parent of every expected error.

    Args:
        message: a sentence for people that names the field and what was wrong with it; never a secret.
        code: a stable identifier such as ``name_taken``; the class's default when absent.
        errors: the fields at fault.
        retry_after_seconds: when to come back, for ``Retry-After``.
    """

    status: int = 500
    default_code: str = "internal_error"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        errors: Sequence[FieldError] = (),
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.errors = tuple(errors)
        self.retry_after_seconds = retry_after_seconds


class FixRequest(DataSyncError):
    """The request itself has to change."""

    status = 400
    default_code = "bad_request"


class InvalidInput(FixRequest):
    """A field is missing, unknown, of the wrong type or out of its bounds."""

    default_code = "validation_error"


class Unauthenticated(FixRequest):
    """No credential, or one that is not valid."""

    status = 401
    default_code = "unauthenticated"


class Forbidden(FixRequest):
    """The credential is valid but does not permit this."""

    status = 403
    default_code = "forbidden"


class InsufficientScope(Forbidden):
    """A valid credential whose scopes exclude this (RFC 6750 section 3.1).

    Args:
        scope: the one that it would need.
    """

    default_code = "insufficient_scope"

    def __init__(
        self,
        message: str,
        scope: str = "",
        *,
        code: str | None = None,
        errors: Sequence[FieldError] = (),
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(message, code=code, errors=errors, retry_after_seconds=retry_after_seconds)
        self.scope = scope


class NotFound(FixRequest):
    """No such entity in this project."""

    status = 404
    default_code = "not_found"


class MethodNotAllowed(FixRequest):
    """The path is known, but not with this method."""

    status = 405
    default_code = "method_not_allowed"


class Conflict(FixRequest):
    """The request conflicts with the entity's state, or a unique name is taken."""

    status = 409
    default_code = "conflict"


class PreconditionFailed(FixRequest):
    """``If-Match`` named a version that is no longer the current one (RFC 9110 section 13.1.1)."""

    status = 412
    default_code = "precondition_failed"


class TooLarge(FixRequest):
    """A body or a field is over its limit."""

    status = 413
    default_code = "too_large"


class UnsupportedMediaType(FixRequest):
    """The body's content type is not one that this route reads."""

    status = 415
    default_code = "unsupported_media_type"


class Unprocessable(FixRequest):
    """The same ``Idempotency-Key`` came with another body."""

    status = 422
    default_code = "idempotency_key_reused"


class RateLimited(FixRequest):
    """Too many requests in this window; ``retry_after_seconds`` says when the next one is admitted."""

    status = 429
    default_code = "rate_limited"


class RetryLater(DataSyncError):
    """The request is valid but can't be processed now; it is safe to retry."""

    status = 503
    default_code = "unavailable"


class OutcomeUnknown(RetryLater):
    """It is unknown whether the command was committed; it is safe to repeat with its Idempotency-Key."""

    default_code = "outcome_unknown"


class NewerVersion(RetryLater):
    """A newer version wrote something that this one can't read; an upgraded instance can."""

    default_code = "newer_version"


class RequestTimeout(RetryLater):
    """The request's body did not arrive in time (RFC 9110 section 15.5.9)."""

    status = 408
    default_code = "request_timeout"


class UpstreamTimeout(RetryLater):
    """A service or a remote database did not answer in time."""

    status = 504
    default_code = "timeout"


class CallOperator(DataSyncError):
    """A fault that neither retrying nor changing the request fixes."""

    status = 500
    default_code = "internal_error"
