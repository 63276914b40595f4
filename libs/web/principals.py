"""The caller's identity, passed between services in a signed token that they can verify but not forge.

A token is a JWT (RFC 7519) signed with Ed25519 (EdDSA, RFC 8037): 30 seconds, one audience. Each service has a key of
its own; only the gateway may speak for users, every other service only for itself.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jwt
from pydantic import SecretStr, ValidationError

from libs.contracts.services import GATEWAY
from libs.core.errors import CallOperator, Unauthenticated
from libs.core.principal import Principal
from libs.process.signing_keys import signing_key_of, trusted_key

PRINCIPAL_HEADER = "X-DataSync-Principal"

TOKEN_SECONDS = 30
TOKEN_REUSE_SECONDS = 5
CLOCK_SKEW_SECONDS = 5
CACHED_MAX = 8_192

_ALGORITHM = "EdDSA"
_GRANT_AUDIENCE = "grant"


@dataclass(frozen=True, slots=True)
class _Signed:
    principal: Principal
    token: str
    reuse_until: float


class PrincipalSigner:
    """Signs tokens as one service.

    Args:
        service: the issuer named in the tokens.
        key: Ed25519 private key, 32 bytes in base64; None for a service that never calls another.
    """

    def __init__(self, service: str, key: SecretStr | None) -> None:
        self.service = service
        self._key = None if key is None else signing_key_of(key.get_secret_value())
        self._self = Principal(kind="service", subject=service, name=service)
        self._signed: dict[tuple[str, str, str, bool], _Signed] = {}

    def sign(
        self, principal: Principal, audience: str, *, may_only_read: bool = False, ttl_seconds: float = TOKEN_SECONDS
    ) -> str:
        """A token that says to ``audience`` who is calling; reused for a few seconds.

        Args:
            may_only_read: the user may not have intended the call (it came from another site), so routes that change
                something must refuse it.
        """
        now = time.time()
        key = (principal.kind, principal.subject, audience, may_only_read)
        known = self._signed.get(key)
        if (
            known is not None
            and now < known.reuse_until
            and (known.principal is principal or known.principal == principal)
        ):
            return known.token
        claims = {"aud": audience, "sub": principal.subject, "principal": principal.model_dump(mode="json")}
        token = self._encode(claims | ({"may_only_read": True} if may_only_read else {}), ttl_seconds)
        if len(self._signed) >= CACHED_MAX:
            self._signed.clear()
        self._signed[key] = _Signed(principal, token, now + TOKEN_REUSE_SECONDS)
        return token

    def sign_as_service(self, audience: str) -> str:
        """A token that says to ``audience`` that this service itself is calling."""
        return self.sign(self._self, audience)

    def sign_grant(self, claims: Mapping[str, Any], *, ttl_seconds: float = 60.0) -> str:
        """A bearer token with claims, such as the right to read a run's configuration."""
        return self._encode({"aud": _GRANT_AUDIENCE, "grant": dict(claims)}, ttl_seconds)

    def _encode(self, claims: dict[str, Any], ttl_seconds: float) -> str:
        if self._key is None:
            raise CallOperator(f"the service {self.service} has no SIGNING_KEY", code="signing_key_missing")
        now = time.time()
        lifetime = {"iss": self.service, "iat": int(now), "exp": int(now + ttl_seconds)}
        return jwt.encode({**claims, **lifetime}, self._key, algorithm=_ALGORITHM)


@dataclass(frozen=True, slots=True)
class Verified:
    """A valid token: the caller, the service that signed it, and whether the call may change anything."""

    principal: Principal
    issuer: str
    expires_at: float
    may_only_read: bool = False


class PrincipalVerifier:
    """Verifies tokens whose audience is one service.

    Args:
        service: the audience that tokens must name.
        trusted_keys: Ed25519 public keys in base64, by issuer.
    """

    def __init__(self, service: str, trusted_keys: Mapping[str, str]) -> None:
        self.service = service
        self._keys = {issuer: trusted_key(issuer, key) for issuer, key in trusted_keys.items()}
        self._verified: dict[str, Verified] = {}

    def verify(self, token: str) -> Verified:
        """Raises ``Unauthenticated`` unless a trusted service signed the token for this one and it has not expired."""
        known = self._verified.get(token)
        if known is not None and time.time() < known.expires_at + CLOCK_SKEW_SECONDS:
            return known
        verified = self._decode_principal(token)
        if len(self._verified) >= CACHED_MAX:
            self._verified.clear()
        self._verified[token] = verified
        return verified

    def verify_grant(self, token: str, issuer: str) -> dict[str, Any]:
        """The claims of a grant; raises ``Unauthenticated`` unless ``issuer`` signed it and it is still valid."""
        claims = self._decode(token, issuer, _GRANT_AUDIENCE)
        grant = claims.get("grant")
        if not isinstance(grant, dict):
            raise Unauthenticated("the grant holds no claims", code="invalid_grant")
        return grant

    def _decode_principal(self, token: str) -> Verified:
        claims = self._decode(token, _issuer_of(token), self.service)
        issuer = str(claims["iss"])
        try:
            principal = Principal.model_validate(claims.get("principal"), extra="ignore")
        except ValidationError:
            raise Unauthenticated("the principal token names no principal", code="invalid_principal") from None
        speaks_for_itself = principal.kind == "service" and principal.subject == issuer
        if not speaks_for_itself and (principal.kind == "service" or issuer != GATEWAY):
            raise Unauthenticated(f"{issuer} may not speak for others", code="invalid_principal")
        return Verified(principal, issuer, float(claims["exp"]), bool(claims.get("may_only_read")))

    def _decode(self, token: str, issuer: str, audience: str) -> dict[str, Any]:
        key = self._keys.get(issuer)
        if key is None:
            raise Unauthenticated("the token's issuer is not trusted here", code="invalid_principal")
        try:
            claims: dict[str, Any] = jwt.decode(
                token,
                key,
                algorithms=[_ALGORITHM],
                audience=audience,
                issuer=issuer,
                leeway=CLOCK_SKEW_SECONDS,
                options={"require": ["exp", "iat", "iss", "aud"]},
            )
        except jwt.PyJWTError as error:
            raise Unauthenticated(f"the token is not valid: {error}", code="invalid_principal") from None
        return claims


def _issuer_of(token: str) -> str:
    try:
        return str(jwt.decode(token, options={"verify_signature": False}).get("iss"))
    except jwt.PyJWTError:
        raise Unauthenticated("the principal token is malformed", code="invalid_principal") from None
