"""What a key may do, and that a revoked one stays revoked."""

from datetime import UTC, datetime

import pytest

from libs.contracts.auth import ApiKeyIssued, ApiKeyRevoked
from libs.core.errors import Conflict, InvalidInput, NotFound
from libs.testing.given import MOMENT, given
from services.auth.domain.api_key import API_KEY, READ_SCOPES, IssueApiKey, Permission, RevokeApiKey, granted_scopes

EXPIRY = datetime(2026, 4, 1, tzinfo=UTC)
ISSUED = ApiKeyIssued(
    name="ci", prefix="ds_live_abcd", permission="read-only", scopes=READ_SCOPES, developer_id=None, expires_at=EXPIRY
)


def issue(permission: Permission = "read-only", scopes: tuple[str, ...] = ()) -> IssueApiKey:
    return IssueApiKey(
        name="ci", prefix="ds_live_abcd", permission=permission, scopes=scopes, developer_id=None, expires_at=EXPIRY
    )


def test_a_read_only_key_holds_every_read_scope_and_nothing_else() -> None:
    then = given(API_KEY).when(issue())
    then.then(ISSUED)
    assert all(scope.endswith(":read") for scope in then.state.scopes)
    assert then.state.created_by == "ada"


def test_a_read_write_key_holds_all_unless_told() -> None:
    assert granted_scopes("read-write", ()) == ("*",)
    assert granted_scopes("read-write", ("sync:write", "sync:write")) == ("sync:write",)


@pytest.mark.parametrize("scope", ["*", "sync:write"])
def test_a_read_only_key_is_refused_a_scope_to_write(scope: str) -> None:
    refusal = given(API_KEY).when(issue(scopes=("sync:read", scope))).then_refused(InvalidInput)
    assert refusal.errors[0].field == "scopes[1]"


def test_an_unknown_scope_is_refused_by_name() -> None:
    refusal = given(API_KEY).when(issue("read-write", ("sink:read",))).then_refused(InvalidInput)
    assert "sink:read" in refusal.message


def test_a_key_is_issued_once() -> None:
    given(API_KEY, ISSUED).when(issue()).then_refused(Conflict, code="key_exists")


def test_a_revoked_key_remembers_when_and_by_whom() -> None:
    then = given(API_KEY, ISSUED).when(RevokeApiKey())
    then.then(ApiKeyRevoked())
    assert (then.state.revoked_at, then.state.revoked_by) == (MOMENT, "ada")


def test_revoking_again_changes_nothing() -> None:
    given(API_KEY, ISSUED, ApiKeyRevoked()).when(RevokeApiKey()).then()


def test_only_an_issued_key_is_revoked() -> None:
    given(API_KEY).when(RevokeApiKey()).then_refused(NotFound, code="key_not_found")
