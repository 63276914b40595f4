"""Signing up, logging in and out, and the session in between."""

import asyncio
from collections import Counter
from http.cookies import SimpleCookie
from typing import Any

import pytest

from libs.core.principal import Principal
from services.auth.config import AuthSettings
from tests.integration.auth.auth_service import ADA, BOOTSTRAP_KEY, Auth, Gateway

pytestmark = pytest.mark.timeout(60)


async def test_a_signup_makes_a_user_and_the_first_project_which_is_123(gateway: Gateway) -> None:
    answer = await gateway.call("POST", "/signup", ADA)
    assert answer.status == 200
    assert answer.data == {"email": "ada@example.com", "username": "ada"}
    resolved = await gateway.resolve(await gateway.session_of("ada"))
    assert resolved.principal is not None
    assert resolved.principal.projects == {123: "owner"}
    assert (resolved.principal.kind, resolved.principal.name) == ("user", "ada")
    assert resolved.principal.scopes == ("*",)


async def test_user_and_project_are_made_in_one_batch(gateway: Gateway) -> None:
    await gateway.sign_up()
    events = (await gateway.service.context.store.read_after(0, 100)).events
    assert [(event.stream, event.type) for event in events] == [
        ("user-1", "user_signed_up"),
        ("project-123", "project_created"),
        ("project-123", "member_added"),
    ]
    assert {event.metadata.actor for event in events} == {"ada"}
    assert {event.metadata.project_id for event in events} == {123}


async def test_first_signups_at_once_share_out_the_projects_and_one_gets_123(auth: Auth) -> None:
    first, second = await auth.start(), await auth.start()
    answers = await asyncio.gather(*((first, second)[n % 2].sign_up(f"user{n}") for n in range(8)))
    assert [answer.status for answer in answers] == [200] * 8
    projects: set[int] = set()
    for n in range(8):
        resolved = await second.resolve(await first.session_of(f"user{n}"))
        assert resolved.principal is not None
        projects |= resolved.principal.projects.keys()
    assert len(projects) == 8
    assert min(projects) == 123


async def test_one_of_fifty_signups_with_one_name_succeeds(auth: Auth) -> None:
    first, second = await auth.start(), await auth.start()
    answers = await asyncio.gather(
        *((first, second)[n % 2].sign_up("ada", email=f"ada{n}@example.com") for n in range(50))
    )
    assert Counter(answer.status for answer in answers) == {200: 1, 409: 49}
    refused = [answer for answer in answers if answer.status == 409]
    assert all(answer.body["success"] is False and "username" in answer.message for answer in refused)


async def test_name_and_address_are_taken_whatever_their_case(gateway: Gateway) -> None:
    await gateway.sign_up("ada")
    name_taken = await gateway.sign_up("ADA", email="other@example.com")
    assert (name_taken.status, name_taken.message) == (409, "the username is already taken")
    address_taken = await gateway.sign_up("other", email="Ada@Example.com")
    assert (address_taken.status, address_taken.message) == (409, "the email is already taken")


async def test_one_of_two_names_taken_is_a_conflict_even_for_a_request_that_may_be_repeated(gateway: Gateway) -> None:
    """An Idempotency-Key leaves the finding of taken names to the write path."""
    await gateway.sign_up("ada")
    body = {"email": "ada@example.com", "username": "other", "password": "correct horse"}
    refused = await gateway.call("POST", "/signup", body, headers={"Idempotency-Key": "other-1"})
    assert (refused.status, refused.message) == (409, "the email is already taken")


async def test_a_bad_field_is_refused_by_name(gateway: Gateway) -> None:
    bad: list[tuple[str, Any]] = [
        ("email", "no address"),
        ("email", "ada@nowhere"),
        ("email", "a" * 250 + "@example.com"),
        ("email", 7),
        ("username", "ad"),
        ("username", "a" * 65),
        ("username", "ada lovelace"),
        ("username", "ada@example.com"),
        ("password", "1234567"),
        ("password", "x" * 1025),
        ("password", None),
    ]
    for field, value in bad:
        answer = await gateway.call("POST", "/signup", {**ADA, field: value})
        assert (answer.status, answer.body["success"]) == (400, False), (field, value)
        assert [error["field"] for error in answer.body["errors"]] == [field]
        assert field in answer.message
        assert field != "password" or str(value) not in str(answer.body)


async def test_a_missing_field_is_refused_by_name(gateway: Gateway) -> None:
    answer = await gateway.call("POST", "/signup", {"username": "ada", "password": "password"})
    assert answer.status == 400
    assert "email" in answer.message


async def test_any_text_of_eight_characters_is_a_password(gateway: Gateway) -> None:
    passwords = ["password", "pässwörter \N{SNOWMAN}", "x" * 1024, " leading and trailing "]
    for number, password in enumerate(passwords):
        assert (await gateway.sign_up(f"user{number}", password=password)).status == 200
        assert (await gateway.log_in(f"user{number}", password)).status == 200
        assert (await gateway.log_in(f"user{number}", "?" + password[1:])).status == 401


async def test_signup_by_invitation_is_closed_to_others(auth: Auth) -> None:
    gateway = await auth.start(auth_signup="invite")
    answer = await gateway.sign_up()
    assert answer.status == 403
    assert "invitation" in answer.message


async def test_a_repeated_signup_with_the_same_idempotency_key_is_answered_again(gateway: Gateway) -> None:
    headers = {"Idempotency-Key": "signup-1"}
    first = await gateway.call("POST", "/signup", ADA, headers=headers)
    second = await gateway.call("POST", "/signup", ADA, headers=headers)
    assert (first.status, first.data) == (second.status, second.data)
    other = await gateway.call("POST", "/signup", {**ADA, "username": "eve"}, headers=headers)
    assert other.status == 422


async def test_a_login_by_name_or_address_sets_the_session_cookie(gateway: Gateway) -> None:
    await gateway.sign_up("Ada")
    answers = [await gateway.log_in(login) for login in ("Ada", "ada", "ADA@example.com")]
    assert [answer.data["username"] for answer in answers] == ["Ada"] * 3
    answer = answers[0]
    cookie = SimpleCookie(answer.headers["Set-Cookie"])["datasync_session"]
    assert cookie.value == answer.data["token"]
    assert cookie["httponly"]
    assert (cookie["samesite"], cookie["path"], cookie["secure"]) == ("Lax", "/", "")
    assert int(cookie["max-age"]) == 7 * 24 * 3600


async def test_the_cookie_is_sent_over_tls_only_where_configured(auth: Auth) -> None:
    gateway = await auth.start(session_cookie_secure=True)
    await gateway.sign_up()
    answer = await gateway.log_in()
    assert SimpleCookie(answer.headers["Set-Cookie"])["datasync_session"]["secure"]


async def test_a_session_is_good_as_cookie_and_as_bearer_until_logout(auth: Auth) -> None:
    """On every instance, and from the moment that the logout is answered."""
    gateway, other = await auth.start(), await auth.start()
    await gateway.sign_up()
    token = await gateway.session_of()
    assert token.startswith("ds_sess_")
    for kind, credential in (("session", token), ("bearer", token), ("bearer", f"Bearer {token}")):
        assert (await other.resolve(credential, kind)).principal is not None
    answer = await gateway.call("POST", "/logout", credential=token)
    assert answer.data == {}
    cookie = SimpleCookie(answer.headers["Set-Cookie"])["datasync_session"]
    assert (cookie.value, cookie["max-age"]) == ("", "0")
    for instance in (gateway, other):
        resolved = await instance.resolve(token)
        assert (resolved.principal, resolved.reason) == (None, "expired")


async def test_logout_by_cookie_ends_that_session_alone(gateway: Gateway) -> None:
    await gateway.sign_up()
    kept, ended = await gateway.session_of(), await gateway.session_of()
    principal = (await gateway.resolve(ended, "session")).principal
    await gateway.call("POST", "/logout", principal=principal, headers={"Cookie": f"datasync_session={ended}"})
    assert (await gateway.resolve(ended, "session")).principal is None
    assert (await gateway.resolve(kept, "session")).principal is not None


async def test_who_am_i_answers_the_name_or_401(gateway: Gateway) -> None:
    await gateway.sign_up()
    token = await gateway.session_of()
    for path in ("/auth", "/auth/check"):
        assert (await gateway.call("GET", path, credential=token)).data == {"username": "ada"}
        anonymous = await gateway.call("GET", path)
        assert (anonymous.status, anonymous.body["success"]) == (401, False)


async def test_a_session_that_is_used_lives_on_and_an_unused_one_ends(auth: Auth) -> None:
    async with auth.started(session_ttl_seconds=1000) as gateway:
        await gateway.sign_up()
        used, unused = await gateway.session_of(), await gateway.session_of()
        auth.clock.advance(900)
        assert (await gateway.resolve(used)).principal is not None
    # What was noted of the session's use is written at the latest when an instance stops.
    gateway = await auth.start(session_ttl_seconds=1000)
    auth.clock.advance(900)
    assert (await gateway.resolve(used)).principal is not None
    assert (await gateway.resolve(unused)).reason == "expired"


async def test_what_is_no_credential_has_no_principal(gateway: Gateway) -> None:
    presented = [
        ("bearer", "authenticated"),
        ("bearer", ""),
        ("bearer", "ds_live_"),
        ("bearer", "ds_sess_" + "0" * 38),
        ("session", BOOTSTRAP_KEY),
        ("session", "x" * 5000),
    ]
    for kind, credential in presented:
        resolved = await gateway.resolve(credential, kind)
        assert (resolved.principal, resolved.reason) == (None, "unknown"), credential


async def test_the_front_end_gets_what_it_asks_of_the_platform(gateway: Gateway) -> None:
    telemetry = await gateway.call("GET", "/telemetry-id")
    assert telemetry.data["user_id"] == ""
    assert telemetry.data["version"]
    await gateway.sign_up()
    token = await gateway.session_of()
    status = await gateway.call("GET", "/api/v1/platform/opt/status", credential=token)
    assert status.data == {"enabled": False}
    releases = await gateway.call("GET", "/api/v1/platform/releases?limit=5", credential=token)
    assert set(releases.data) == {"olake_ui_worker", "olake_helm", "olake", "features"}
    assert all(part == {"releases": []} for part in releases.data.values())


async def test_the_bootstrap_key_owns_the_first_project_before_and_after_it_is_made(gateway: Gateway) -> None:
    for _ in range(2):
        resolved = await gateway.resolve(f"Bearer {BOOTSTRAP_KEY}")
        assert resolved.principal == Principal(
            kind="api_key",
            subject="bootstrap",
            name="bootstrap-key",
            projects={123: "owner"},
            scopes=("*",),
        )
        await gateway.sign_up()
    assert (await gateway.resolve(BOOTSTRAP_KEY + "!")).principal is None


def test_a_short_bootstrap_key_is_a_bad_setting() -> None:
    with pytest.raises(ValueError, match="at least 8"):
        AuthSettings.model_validate({"api_key": "1234567"})
