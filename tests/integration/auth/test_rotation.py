"""A key's second secret, its end in time, and what is said of it before."""

import asyncio
from typing import Any

from libs.testing.followers import history
from services.auth.domain.api_key import API_KEY
from services.auth.expiry import ExpiryAnnouncer
from services.auth.queries import AuthQueries
from tests.integration.auth.auth_service import BOOTSTRAP_KEY, Answer, Auth, Gateway
from tests.integration.auth.test_keys import issue, owner_of

HOUR_SECONDS = 3600
DAY_SECONDS = 24 * HOUR_SECONDS


async def rotate(gateway: Gateway, key: dict[str, Any], credential: str, **body: Any) -> Answer:
    return await gateway.call("POST", f"/api/v2/keys/{key['id']}/rotate", body or None, credential=credential)


async def opens(gateway: Gateway, secret: str) -> bool:
    return (await gateway.resolve(secret)).principal is not None


async def test_both_secrets_open_until_the_overlap_ends(auth: Auth) -> None:
    gateway, other = await auth.start(), await auth.start()
    key = await issue(gateway, BOOTSTRAP_KEY, scopes=["sync:read"])
    auth.clock.advance(10 * DAY_SECONDS)
    rotated = (await rotate(gateway, key, BOOTSTRAP_KEY, overlap_seconds=HOUR_SECONDS)).body
    assert rotated["id"] == key["id"]
    assert rotated["secret"] not in (None, key["secret"])
    assert rotated["secret"].startswith(rotated["prefix"])
    assert rotated["expires_at"] > key["expires_at"]
    for instance in (gateway, other):
        for secret in (key["secret"], rotated["secret"]):
            resolved = await instance.resolve(secret)
            assert resolved.principal is not None
            assert (resolved.principal.subject, resolved.principal.scopes) == (key["id"], ("sync:read",))
    auth.clock.advance(HOUR_SECONDS - 1)
    assert await opens(gateway, key["secret"])
    auth.clock.advance(1)
    assert (await gateway.resolve(key["secret"])).reason == "expired"
    auth.clock.advance(80 * DAY_SECONDS)
    assert await opens(other, rotated["secret"])
    auth.clock.advance(10 * DAY_SECONDS)
    assert (await gateway.resolve(rotated["secret"])).reason == "expired"


async def test_a_rotation_without_a_body_overlaps_for_a_day_and_one_of_zero_not_at_all(auth: Auth) -> None:
    gateway = await auth.start()
    ada = await owner_of(gateway)
    first = await issue(gateway, ada)
    second = (await rotate(gateway, first, ada)).body
    auth.clock.advance(DAY_SECONDS - 1)
    assert await opens(gateway, first["secret"])
    auth.clock.advance(1)
    assert not await opens(gateway, first["secret"])
    third = (await rotate(gateway, first, ada, overlap_seconds=0, expires_in_days=1)).body
    assert [await opens(gateway, secret["secret"]) for secret in (second, third)] == [False, True]
    auth.clock.advance(DAY_SECONDS)
    assert not await opens(gateway, third["secret"])


async def test_a_revoked_key_opens_with_no_secret(gateway: Gateway) -> None:
    ada = await owner_of(gateway)
    key = await issue(gateway, ada)
    rotated = (await rotate(gateway, key, ada)).body
    await gateway.call("DELETE", f"/api/v2/keys/{key['id']}", credential=ada)
    for secret in (key["secret"], rotated["secret"]):
        assert (await gateway.resolve(secret)).reason == "revoked"
    refused = await rotate(gateway, key, ada)
    assert (refused.status, refused.body["code"]) == (409, "key_revoked")


async def test_rotations_at_once_leave_every_secret_that_was_shown_good(auth: Auth) -> None:
    gateway, other = await auth.start(), await auth.start()
    ada = await owner_of(gateway)
    key = await issue(gateway, ada)
    answers = await asyncio.gather(*(rotate((gateway, other)[n % 2], key, ada) for n in range(8)))
    shown = [answer.body["secret"] for answer in answers if answer.status == 200]
    assert len(shown) == 8
    assert await asyncio.gather(*(opens(gateway, secret) for secret in (key["secret"], *shown))) == [True] * 9


async def test_a_repeated_rotation_rotates_once_and_shows_no_secret(gateway: Gateway) -> None:
    ada = await owner_of(gateway)
    key = await issue(gateway, ada)
    path, headers = f"/v2/keys/{key['id']}/rotate", {"Idempotency-Key": "rotation-1"}
    first, again = [await gateway.call("POST", path, {}, credential=ada, headers=headers) for _ in range(2)]
    assert (first.status, again.status) == (200, 200)
    assert (again.body["secret"], again.body["rotated_at"]) == (None, first.body["rotated_at"])
    assert await opens(gateway, first.body["secret"])
    history = await gateway.call("GET", f"/v2/keys/{key['id']}/history", credential=ada)
    assert [event["type"] for event in history.body["events"]] == ["api_key_rotated", "api_key_issued"]


async def test_a_stale_version_a_stranger_and_a_narrower_key_rotate_nothing(gateway: Gateway) -> None:
    ada, eve = await owner_of(gateway), await owner_of(gateway, "eve")
    key = await issue(gateway, ada)
    narrow = await issue(gateway, ada, scopes=["keys:write"])
    path = f"/api/v2/keys/{key['id']}/rotate"
    assert (await gateway.call("POST", path, {}, credential=eve)).status == 404
    assert (await gateway.call("POST", path, {}, credential=narrow["secret"])).status == 403
    assert (await gateway.call("POST", path, {}, credential=ada, headers={"If-Match": '"7"'})).status == 412
    for bad in (-1, 30 * DAY_SECONDS + 1, "3600", 1.5):
        refused = await rotate(gateway, key, ada, overlap_seconds=bad)
        assert (refused.status, "overlap_seconds" in refused.body["message"]) == (400, True)
    itself = await rotate(gateway, narrow, narrow["secret"])
    assert itself.status == 200
    assert (await gateway.call("GET", f"/api/v2/keys/{key['id']}", credential=ada)).body["rotated_at"] is None


async def test_a_key_is_renamed_for_everybody(gateway: Gateway) -> None:
    ada = await owner_of(gateway)
    key = await issue(gateway, ada)
    renamed = await gateway.call("PATCH", f"/api/v2/keys/{key['id']}", {"name": "deploy"}, credential=ada)
    assert (renamed.status, renamed.body["name"]) == (200, "deploy")
    resolved = await gateway.resolve(key["secret"])
    assert resolved.principal is not None
    assert resolved.principal.name == "deploy"
    for body in ({}, {"name": ""}, {"scopes": ["*"]}):
        assert (await gateway.call("PATCH", f"/api/v2/keys/{key['id']}", body, credential=ada)).status == 400


async def test_a_near_end_is_told_with_every_use_and_announced_once(auth: Auth) -> None:
    gateway, other = await auth.start(), await auth.start()
    ada = await owner_of(gateway)
    key = await issue(gateway, ada)
    announcers = []
    for instance in (gateway, other):
        context = instance.service.context
        announcers.append(ExpiryAnnouncer(context.commands, AuthQueries(context.documents), auth.clock))
    assert await announcers[0].announce() == 0
    assert (await gateway.resolve(key["secret"])).expires_soon_at is None
    auth.clock.advance(84 * DAY_SECONDS)
    resolved = await gateway.resolve(key["secret"])
    assert resolved.expires_soon_at is not None
    assert resolved.expires_soon_at.isoformat(timespec="milliseconds").replace("+00:00", "Z") == key["expires_at"]
    await asyncio.gather(*(announcer.announce() for announcer in announcers))
    assert [await announcer.announce() for announcer in announcers] == [0, 0]
    [event, _] = reversed(await history(gateway.service.context.store, API_KEY.stream(key["id"])))
    assert (event.type, event.metadata.actor, event.metadata.project_id) == ("api_key_expiring", "system", 123)


async def test_the_first_projects_owners_alone_give_a_plan(gateway: Gateway) -> None:
    """The bootstrap key is one of them."""
    ada, eve = await owner_of(gateway), await owner_of(gateway, "eve")
    keys = [await issue(gateway, operator, plan="enterprise") for operator in (ada, BOOTSTRAP_KEY)]
    for operator, key in zip((ada, BOOTSTRAP_KEY), keys, strict=True):
        rotated = (await rotate(gateway, key, operator)).body
        for secret in (key["secret"], rotated["secret"]):
            resolved = await gateway.resolve(secret)
            assert resolved.principal is not None
            assert (resolved.principal.subject, resolved.principal.rate_class) == (key["id"], "enterprise")
    standard = await issue(gateway, eve)
    assert standard["plan"] == "standard"
    for credential in (eve, standard["secret"], keys[0]["secret"]):
        body = {"name": "x", "plan": "enterprise"}
        refused = await gateway.call("POST", "/api/v2/keys", body, credential=credential)
        assert (refused.status, refused.body["code"]) == (403, "not_an_operator")
        refused = await gateway.call("POST", "/api/v2/oauth/clients", body, credential=credential)
        assert refused.status == 403
