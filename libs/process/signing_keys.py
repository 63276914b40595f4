"""The Ed25519 keys (RFC 8032) that services sign their calls with, as settings hold them."""

import base64

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat


def new_signing_key() -> tuple[str, str]:
    """A new key: the private half for ``SIGNING_KEY``, the public half for the others' ``TRUSTED_KEYS``."""
    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption())
    return base64.b64encode(private).decode(), public_key_of(base64.b64encode(private).decode())


def public_key_of(signing_key: str) -> str:
    """The public half of a private key, both 32 bytes in base64."""
    public = signing_key_of(signing_key).public_key()
    return base64.b64encode(public.public_bytes(Encoding.Raw, PublicFormat.Raw)).decode()


def signing_key_of(text: str) -> Ed25519PrivateKey:
    """The private key in a ``SIGNING_KEY``; raises ``ValueError`` where it is none."""
    try:
        return Ed25519PrivateKey.from_private_bytes(base64.b64decode(text, validate=True))
    except ValueError:
        raise ValueError("must be an Ed25519 private key: 32 bytes in base64") from None


def trusted_key(issuer: str, text: str) -> Ed25519PublicKey:
    """The public key of an issuer; raises ``ValueError`` where it is none."""
    try:
        return Ed25519PublicKey.from_public_bytes(base64.b64decode(text, validate=True))
    except ValueError:
        raise ValueError(f"the key of {issuer} must be an Ed25519 public key: 32 bytes in base64") from None
