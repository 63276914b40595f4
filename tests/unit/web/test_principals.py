"""Who may say who is calling."""

import base64
import time
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import SecretStr

from libs.core.errors import CallOperator, Unauthenticated
from libs.core.principal import Principal
from libs.process.signing_keys import new_signing_key, public_key_of
from libs.web.principals import PrincipalSigner, PrincipalVerifier

ADA = Principal(kind="user", subject="1", name="ada", projects={123: "owner"}, scopes=("*",))
GATEWAY_KEY, GATEWAY_PUBLIC = new_signing_key()
CATALOG_KEY, CATALOG_PUBLIC = new_signing_key()
TRUSTED = {"gateway": GATEWAY_PUBLIC, "catalog": CATALOG_PUBLIC}

GATEWAY = PrincipalSigner("gateway", SecretStr(GATEWAY_KEY))
CATALOG = PrincipalSigner("catalog", SecretStr(CATALOG_KEY))


@pytest.fixture
def verifier() -> PrincipalVerifier:
    return PrincipalVerifier("auth", TRUSTED)


def test_the_public_half_belongs_to_the_private_one() -> None:
    assert public_key_of(GATEWAY_KEY) == GATEWAY_PUBLIC


def test_a_principal_comes_through_as_it_was_signed(verifier: PrincipalVerifier) -> None:
    token = GATEWAY.sign(ADA, "auth")
    for _ in range(2):
        verified = verifier.verify(token)
        assert (verified.principal, verified.issuer) == (ADA, "gateway")


def test_a_service_speaks_for_itself(verifier: PrincipalVerifier) -> None:
    principal = verifier.verify(CATALOG.sign_as_service("auth")).principal
    assert (principal.kind, principal.subject) == ("service", "catalog")


def test_tokens_are_reused_for_a_while_and_not_across_audiences_or_changed_principals() -> None:
    signer = PrincipalSigner("gateway", SecretStr(GATEWAY_KEY))
    assert signer.sign(ADA, "auth") is signer.sign(ADA.model_copy(), "auth")
    assert signer.sign(ADA, "catalog") != signer.sign(ADA, "auth")
    less = ADA.model_copy(update={"projects": {}})
    verified = PrincipalVerifier("auth", TRUSTED).verify(signer.sign(less, "auth"))
    assert verified.principal.projects == {}


def test_a_token_for_another_service_is_refused(verifier: PrincipalVerifier) -> None:
    with pytest.raises(Unauthenticated):
        verifier.verify(GATEWAY.sign(ADA, "catalog"))


def test_only_the_gateway_speaks_for_users(verifier: PrincipalVerifier) -> None:
    with pytest.raises(Unauthenticated, match="may not speak for others"):
        verifier.verify(CATALOG.sign(ADA, "auth"))


def test_no_service_speaks_for_another_service(verifier: PrincipalVerifier) -> None:
    worker = Principal(kind="service", subject="worker", name="worker")
    for signer in (CATALOG, GATEWAY):
        with pytest.raises(Unauthenticated, match="may not speak for others"):
            verifier.verify(signer.sign(worker, "auth"))


def test_a_key_that_is_not_trusted_is_refused(verifier: PrincipalVerifier) -> None:
    key, _ = new_signing_key()
    for issuer in ("gateway", "stranger"):
        with pytest.raises(Unauthenticated):
            verifier.verify(PrincipalSigner(issuer, SecretStr(key)).sign(ADA, "auth"))


@pytest.mark.parametrize(
    "change",
    [
        {"exp": time.time() - 60},
        {"exp": None},
        {"aud": "catalog"},
        {"aud": None},
        {"principal": {"kind": "root"}},
        {"principal": None},
    ],
)
def test_claims_that_do_not_hold_are_refused(verifier: PrincipalVerifier, change: dict[str, Any]) -> None:
    with pytest.raises(Unauthenticated):
        verifier.verify(_token(_claims() | change))


def test_the_claims_that_these_are_changes_of_are_accepted(verifier: PrincipalVerifier) -> None:
    assert verifier.verify(_token(_claims())).principal == ADA


def test_an_unsigned_token_is_refused(verifier: PrincipalVerifier) -> None:
    with pytest.raises(Unauthenticated):
        verifier.verify(jwt.encode(_claims(), "", algorithm="none"))


def test_a_token_signed_with_the_public_key_as_a_secret_is_refused(verifier: PrincipalVerifier) -> None:
    with pytest.raises(Unauthenticated):
        verifier.verify(jwt.encode(_claims(), base64.b64decode(GATEWAY_PUBLIC), algorithm="HS256"))


@pytest.mark.parametrize("token", ["", "x", "a.b.c", "é" * 10])
def test_nonsense_is_refused(verifier: PrincipalVerifier, token: str) -> None:
    with pytest.raises(Unauthenticated):
        verifier.verify(token)


def test_a_grant_gives_its_claims_to_who_trusts_the_issuer(verifier: PrincipalVerifier) -> None:
    grant = CATALOG.sign_grant({"run_id": "r-1", "source_id": 7})
    assert verifier.verify_grant(grant, "catalog") == {"run_id": "r-1", "source_id": 7}
    with pytest.raises(Unauthenticated):
        verifier.verify_grant(grant, "gateway")


def test_grants_and_principals_do_not_stand_in_for_each_other(verifier: PrincipalVerifier) -> None:
    with pytest.raises(Unauthenticated):
        verifier.verify(GATEWAY.sign_grant({"principal": ADA.model_dump(mode="json")}))
    with pytest.raises(Unauthenticated):
        verifier.verify_grant(GATEWAY.sign(ADA, "auth"), "gateway")


def test_a_grant_ends(verifier: PrincipalVerifier) -> None:
    with pytest.raises(Unauthenticated, match="expired"):
        verifier.verify_grant(CATALOG.sign_grant({}, ttl_seconds=-10), "catalog")


def test_a_service_without_a_key_says_so() -> None:
    with pytest.raises(CallOperator, match="SIGNING_KEY"):
        PrincipalSigner("worker", None).sign_as_service("catalog")


@pytest.mark.parametrize("key", ["", "not base64!", base64.b64encode(b"short").decode()])
def test_a_bad_key_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match="Ed25519 private key"):
        PrincipalSigner("catalog", SecretStr(key))
    with pytest.raises(ValueError, match="the key of gateway"):
        PrincipalVerifier("auth", {"gateway": key})


def _claims() -> dict[str, Any]:
    now = int(time.time())
    principal = ADA.model_dump(mode="json")
    return {"iss": "gateway", "aud": "auth", "iat": now, "exp": now + 30, "principal": principal}


def _token(claims: dict[str, Any]) -> str:
    key = Ed25519PrivateKey.from_private_bytes(base64.b64decode(GATEWAY_KEY))
    return jwt.encode({name: value for name, value in claims.items() if value is not None}, key, algorithm="EdDSA")
