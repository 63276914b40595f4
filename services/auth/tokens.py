"""The texts that callers hold: session tokens, API keys, OAuth secrets and tokens. Only their SHA-256 is ever kept."""

import hashlib

from libs.core.ids import checksum_base62, random_base62

SESSION_PREFIX = "ds_sess_"
API_KEY_PREFIX = "ds_live_"
CLIENT_SECRET_PREFIX = "ds_ocs_"  # noqa: S105 - what every secret begins with
ACCESS_TOKEN_PREFIX = "ds_oat_"  # noqa: S105 - what every token begins with
RANDOM_LENGTH = 32
CHECKSUM_LENGTH = 6
SHOWN_LENGTH = 4


def new_session_token() -> str:
    """190 random bits."""
    return _with_checksum(SESSION_PREFIX + random_base62(RANDOM_LENGTH))


def new_api_key() -> str:
    """190 random bits and a checksum, so that a mistyped key is refused without a query."""
    return _with_checksum(API_KEY_PREFIX + random_base62(RANDOM_LENGTH))


def new_client_secret() -> str:
    """190 random bits: an OAuth client's password."""
    return _with_checksum(CLIENT_SECRET_PREFIX + random_base62(RANDOM_LENGTH))


def new_access_token() -> str:
    """190 random bits without any content."""
    return _with_checksum(ACCESS_TOKEN_PREFIX + random_base62(RANDOM_LENGTH))


def is_session_token(text: str) -> bool:
    return _well_formed(text, SESSION_PREFIX)


def is_api_key(text: str) -> bool:
    return _well_formed(text, API_KEY_PREFIX)


def is_access_token(text: str) -> bool:
    return _well_formed(text, ACCESS_TOKEN_PREFIX)


def shown_prefix(api_key: str) -> str:
    """The part of a key that lists show: ``ds_live_`` and four characters."""
    return api_key[: len(API_KEY_PREFIX) + SHOWN_LENGTH]


def token_hash(text: str) -> str:
    """SHA-256 in hexadecimal; no salt or stretching is needed because these texts are random."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _with_checksum(text: str) -> str:
    return text + checksum_base62(text)


def _well_formed(text: str, prefix: str) -> bool:
    if not text.isascii() or not text.startswith(prefix) or len(text) != len(prefix) + RANDOM_LENGTH + CHECKSUM_LENGTH:
        return False
    return checksum_base62(text[:-CHECKSUM_LENGTH]) == text[-CHECKSUM_LENGTH:]
