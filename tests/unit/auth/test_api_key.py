"""What a key may do, and that a revoked one stays revoked."""

from datetime import UTC, datetime, timedelta

import pytest

from libs.contracts.auth import ApiKeyExpiring, ApiKeyIssued, ApiKeyRenamed, ApiKeyRevoked, ApiKeyRotated
from libs.core.envelope import Event
from libs.core.errors import Conflict, InvalidInput, NotFound
from libs.core.scopes import READ_SCOPES
from libs.testing.given import MOMENT, given
from services.auth.domain.api_key import (
    API_KEY,
    EARLIER_SECRETS_MAX,
    AnnounceExpiry,
    IssueApiKey,
    RenameApiKey,
    RevokeApiKey,
    RotateApiKey,
)
from services.auth.domain.scopes import Permission, granted_scopes

EXPIRY = datetime(2026, 4, 1, tzinfo=UTC)
ISSUED = ApiKeyIssued(
    name="ci", prefix="ds_live_abcd", permission="read-only", scopes=READ_SCOPES, developer_id=None, expires_at=EXPIRY
)


DAY = timedelta(days=1)


def rotate(secret_id: str = "s1", at: datetime = MOMENT, overlap: timedelta = DAY) -> RotateApiKey:
    return RotateApiKey(secret_id, "ds_live_efgh", at, overlap)


def issue(permission: Permission = "read-only", scopes: tuple[str, ...] | None = None) -> IssueApiKey:
    return IssueApiKey(
        name="ci", prefix="ds_live_abcd", permission=permission, scopes=scopes, developer_id=None, expires_at=EXPIRY
    )


def test_a_read_only_key_holds_every_read_scope_and_nothing_else() -> None:
    then = given(API_KEY).when(issue())
    then.then(ISSUED)
    assert all(scope.endswith(":read") for scope in then.state.scopes)
    assert then.state.created_by == "ada"


def test_a_read_write_key_holds_all_unless_told() -> None:
    assert granted_scopes("read-write", None) == ("*",)
    assert granted_scopes("read-write", ()) == ()
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


def test_a_rotated_key_has_another_secret_and_its_lifetime_anew() -> None:
    then = given(API_KEY, ISSUED).when(rotate())
    until = MOMENT + DAY
    then.then(ApiKeyRotated(secret_id="s1", prefix="ds_live_efgh", previous_valid_until=until, expires_at=EXPIRY))
    key = then.state
    assert key.refusal_of("s1", until) is None
    assert key.refusal_of("", until - timedelta(milliseconds=1)) is None
    assert key.refusal_of("", until) == "expired"
    assert key.refusal_of("never issued", MOMENT) == "expired"


def test_an_overlap_ends_with_the_former_secret_itself() -> None:
    then = given(API_KEY, ISSUED).when(rotate(at=EXPIRY - DAY, overlap=30 * DAY))
    assert then.state.end_of("") == EXPIRY


def test_of_two_rotations_at_once_both_new_secrets_are_good() -> None:
    first = given(API_KEY, ISSUED).when(rotate("s1"))
    second = given(API_KEY, ISSUED, *first.events).when(rotate("s2")).state
    assert [second.refusal_of(secret, MOMENT) for secret in ("", "s1", "s2")] == [None] * 3


def test_a_revoked_key_is_refused_with_every_secret_and_not_rotated() -> None:
    rotated = given(API_KEY, ISSUED).when(rotate()).events
    revoked = given(API_KEY, ISSUED, *rotated).when(RevokeApiKey())
    assert {revoked.state.refusal_of(secret, MOMENT) for secret in ("", "s1")} == {"revoked"}
    given(API_KEY, ISSUED, *rotated, ApiKeyRevoked()).when(rotate("s2")).then_refused(Conflict, code="key_revoked")


def test_the_secrets_that_are_good_at_once_are_bounded() -> None:
    history: list[Event] = [ISSUED]
    for number in range(EARLIER_SECRETS_MAX):
        history += given(API_KEY, *history).when(rotate(f"s{number}")).events
    given(API_KEY, *history).when(rotate("one more")).then_refused(Conflict, code="too_many_secrets")
    given(API_KEY, *history).when(rotate("later", at=MOMENT + 2 * DAY)).state.end_of("later")


@pytest.mark.parametrize(("left", "announced"), [(8 * DAY, False), (7 * DAY, True), (0 * DAY, False)])
def test_the_last_week_is_announced(left: timedelta, announced: bool) -> None:
    then = given(API_KEY, ISSUED).when(AnnounceExpiry(EXPIRY - left))
    then.then(*([ApiKeyExpiring(expires_at=EXPIRY)] if announced else []))


def test_an_end_is_announced_once_and_again_after_a_rotation() -> None:
    told = [ISSUED, ApiKeyExpiring(expires_at=EXPIRY)]
    given(API_KEY, *told).when(AnnounceExpiry(EXPIRY - DAY)).then()
    rotated = given(API_KEY, *told).when(rotate()).events
    given(API_KEY, *told, *rotated).when(AnnounceExpiry(EXPIRY - DAY)).then(ApiKeyExpiring(expires_at=EXPIRY))


def test_a_new_name_is_an_event_and_the_same_one_is_none() -> None:
    given(API_KEY, ISSUED).when(RenameApiKey("deploy")).then(ApiKeyRenamed(name="deploy"))
    given(API_KEY, ISSUED).when(RenameApiKey("ci")).then()
