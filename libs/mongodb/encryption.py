"""Secrets at rest: AES-256-GCM envelope encryption.

Every secret is encrypted with a data key of its own, and that key is wrapped with a key of the environment, which has a
key id. There may be several: the first one wraps, all of them unwrap, and ``rewrap`` wraps a data key with the first
one without decrypting the secret (NIST SP 800-57 part 1, section 5.2.4: key wrapping keys).
"""

import base64
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from pydantic import SecretStr

from libs.core.errors import CallOperator
from libs.mongodb.client import Collection

KEY_BYTES = 32
NONCE_BYTES = 12


@dataclass(frozen=True, slots=True)
class Sealed:
    """An encrypted secret.

    Args:
        key_id: of the environment's key that wrapped the data key.
        wrapped_key: nonce and wrapped data key.
        ciphertext: nonce and encrypted secret.
    """

    key_id: str
    wrapped_key: bytes
    ciphertext: bytes

    def document(self) -> dict[str, Any]:
        """The fields of a stored document."""
        return {"key_id": self.key_id, "wrapped_key": self.wrapped_key, "ciphertext": self.ciphertext}

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> "Sealed":
        return cls(document["key_id"], bytes(document["wrapped_key"]), bytes(document["ciphertext"]))


class Keyring:
    """The environment's keys.

    Args:
        keys: 32 bytes in base64, by key id; the first one encrypts.

    Raises:
        ValueError: there is no key, or one is not 32 bytes in base64; the message contains no key.
    """

    def __init__(self, keys: Mapping[str, SecretStr]) -> None:
        if not keys:
            raise ValueError("ENCRYPTION_KEYS must hold at least one key")
        self._keys = {key_id: AESGCM(_key_bytes(key_id, key)) for key_id, key in keys.items()}
        self.current_key_id = next(iter(keys))

    def encrypt(self, secret: bytes, associated: bytes) -> Sealed:
        """Encrypt. Decryption needs the same ``associated``, so a stored secret can't be copied to another place."""
        data_key = AESGCM.generate_key(bit_length=KEY_BYTES * 8)
        return Sealed(self.current_key_id, self._wrap(data_key), _seal(AESGCM(data_key), secret, associated))

    def decrypt(self, sealed: Sealed, associated: bytes) -> bytes:
        """Raises ``CallOperator`` if the key is missing or the stored secret was altered."""
        return _open(AESGCM(self._unwrap(sealed)), sealed.ciphertext, associated)

    def rewrap(self, sealed: Sealed) -> Sealed:
        """The same secret with its data key wrapped with the current key."""
        if sealed.key_id == self.current_key_id:
            return sealed
        return Sealed(self.current_key_id, self._wrap(self._unwrap(sealed)), sealed.ciphertext)

    def _wrap(self, data_key: bytes) -> bytes:
        return _seal(self._keys[self.current_key_id], data_key, self.current_key_id.encode())

    def _unwrap(self, sealed: Sealed) -> bytes:
        key = self._keys.get(sealed.key_id)
        if key is None:
            raise CallOperator(
                f"a secret is encrypted with the key {sealed.key_id!r}, which is missing in ENCRYPTION_KEYS",
                code="encryption_key_missing",
            )
        return _open(key, sealed.wrapped_key, sealed.key_id.encode())


async def rewrap_secrets(secrets: Collection, keyring: Keyring) -> int:
    """Wrap every stored secret's data key with the current key; afterwards the older keys can be removed.

    Safe to run while the service runs, and to repeat: a secret that is replaced meanwhile is left alone.

    Returns:
        How many secrets were rewrapped.
    """
    rewrapped = 0
    async for document in secrets.find({"key_id": {"$exists": True, "$ne": keyring.current_key_id}}):
        sealed = Sealed.of(document)
        unchanged = {"_id": document["_id"], **sealed.document()}
        result = await secrets.update_one(unchanged, {"$set": keyring.rewrap(sealed).document()})
        rewrapped += result.modified_count
    return rewrapped


def _seal(key: AESGCM, plaintext: bytes, associated: bytes) -> bytes:
    nonce = os.urandom(NONCE_BYTES)
    return nonce + key.encrypt(nonce, plaintext, associated)


def _open(key: AESGCM, sealed: bytes, associated: bytes) -> bytes:
    try:
        return key.decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], associated)
    except (InvalidTag, ValueError):
        raise CallOperator("a stored secret can't be decrypted: it was altered", code="secret_altered") from None


def _key_bytes(key_id: str, key: SecretStr) -> bytes:
    try:
        decoded = base64.b64decode(key.get_secret_value(), validate=True)
    except ValueError:
        decoded = b""
    if len(decoded) != KEY_BYTES:
        raise ValueError(f"the key {key_id!r} of ENCRYPTION_KEYS must be {KEY_BYTES} bytes in base64")
    return decoded
