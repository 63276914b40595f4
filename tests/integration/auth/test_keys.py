"""API keys from issue to revocation, and that no secret is kept anywhere."""

import asyncio
from typing import Any

import orjson
import pytest

from libs.testing.followers import history
from services.auth.domain.api_key import API_KEY
from services.auth.tokens import token_hash
from tests.integration.auth.auth_service import BOOTSTRAP_KEY, Auth, Gateway


async def owner_of(gateway: Gateway, username: str = "ada") -> str:
    await gateway.sign_up(username)
    return await gateway.session_of(username)


async def issue(gateway: Gateway, credential: str, **fields: Any) -> dict[str, Any]:
    answer = await gateway.call("POST", "/api/v2/keys", {"name": "ci", **fields}, credential=credential)
    assert answer.status == 201, answer.body
    body: dict[str, Any] = answer.body
    return body


async def test_a_key_is_shown_once_and_opens_its_project(gateway: Gateway) -> None:
    ada = await owner_of(gateway)
    key = await issue(gateway, ada)
    assert key["secret"].startswith(key["prefix"])
    assert (key["permission"], key["scopes"], key["project_id"]) == ("read-write", ["*"], 123)
    for presented in (key["secret"], f"Bearer {key['secret']}"):
        resolved = await gateway.resolve(presented)
        assert resolved.principal is not None
        assert (resolved.principal.kind, resolved.principal.subject, resolved.principal.name) == (
            "api_key",
            key["id"],
            "ci",
        )
        assert resolved.principal.projects == {123: "member"}
    listed = await gateway.call("GET", "/api/v2/keys", credential=ada)
    [shown] = listed.body["keys"]
    assert "secret" not in shown
    assert key["secret"] not in str(listed.body)
    one = await gateway.call("GET", f"/api/v2/keys/{key['id']}", credential=ada)
    assert one.body["id"] == key["id"]


async def test_a_read_only_key_reads_only(gateway: Gateway) -> None:
    ada = await owner_of(gateway)
    key = await issue(gateway, ada, permission="read-only")
    assert all(scope.endswith(":read") for scope in key["scopes"])
    assert (await gateway.call("GET", "/api/v2/keys", credential=key["secret"])).status == 200
    refused = await gateway.call("POST", "/api/v2/keys", {"name": "x"}, credential=key["secret"])
    assert refused.status == 403
    assert set(refused.body) >= {"error", "message", "code"}


async def test_a_key_grants_no_more_than_it_holds(gateway: Gateway) -> None:
    ada = await owner_of(gateway)
    narrow = await issue(gateway, ada, scopes=["keys:write", "sync:read"])
    body = {"name": "wider", "scopes": ["sync:read", "jobs:write"]}
    refused = await gateway.call("POST", "/api/v2/keys", body, credential=narrow["secret"])
    assert refused.status == 403
    assert "jobs:write" in refused.body["message"]
    assert (await issue(gateway, narrow["secret"], scopes=["sync:read"]))["scopes"] == ["sync:read"]
    bound = await issue(gateway, ada, developer_id="dev-1")
    resolved = await gateway.resolve(bound["secret"])
    assert resolved.principal is not None
    assert resolved.principal.developer_id == "dev-1"
    for path in ("/api/v2/keys", "/api/v1/users", "/api/v2/oauth/clients"):
        elsewhere = await gateway.call("GET", path, credential=bound["secret"])
        assert (elsewhere.status, elsewhere.body["code"]) == (403, "bound_to_developer")


async def test_a_key_with_no_scopes_holds_none(gateway: Gateway) -> None:
    """An empty list is what a form sends when every box is cleared."""
    ada = await owner_of(gateway)
    key = await issue(gateway, ada, scopes=[])
    assert key["scopes"] == []
    for method, path in (("GET", "/api/v2/keys"), ("POST", "/api/v2/keys"), ("GET", "/api/v1/projects")):
        refused = await gateway.call(method, path, {"name": "x"}, credential=key["secret"])
        assert (refused.status, refused.body["code"]) == (403, "insufficient_scope")
    client = await gateway.call("POST", "/api/v2/oauth/clients", {"name": "c", "scopes": []}, credential=ada)
    assert client.body["scopes"] == []


async def test_a_member_changes_no_credential_of_others(gateway: Gateway) -> None:
    """A rotation would hand the member the owner's key."""
    ada = await owner_of(gateway)
    bob_user = {"username": "bob", "email": "bob@example.com", "password": "password"}
    await gateway.call("POST", "/api/v1/users", bob_user, credential=ada)
    bob = await gateway.session_of("bob")
    owners, own = await issue(gateway, ada), await issue(gateway, bob)
    client = (await gateway.call("POST", "/api/v2/oauth/clients", {"name": "c"}, credential=ada)).body
    attempts: list[tuple[str, str, Any]] = [
        ("POST", f"/api/v2/keys/{owners['id']}/rotate", None),
        ("PATCH", f"/api/v2/keys/{owners['id']}", {"name": "mine"}),
        ("DELETE", f"/api/v2/keys/{owners['id']}", None),
        ("DELETE", f"/api/v2/oauth/clients/{client['id']}", None),
    ]
    for caller in (bob, own["secret"]):
        for method, path, body in attempts:
            refused = await gateway.call(method, path, body, credential=caller)
            assert (refused.status, refused.body["code"]) == (403, "not_an_owner"), (method, path)
    assert (await gateway.resolve(owners["secret"])).principal is not None
    for caller in (own["secret"], bob, ada):
        rotated = await gateway.call("POST", f"/api/v2/keys/{own['id']}/rotate", None, credential=caller)
        assert rotated.status == 200
    assert (await gateway.call("DELETE", f"/api/v2/keys/{own['id']}", credential=ada)).status == 200
    assert (await gateway.call("DELETE", f"/api/v2/keys/{owners['id']}", credential=BOOTSTRAP_KEY)).status == 200


async def test_no_key_has_more_than_a_members_role(gateway: Gateway) -> None:
    ada = await owner_of(gateway)
    key = await issue(gateway, ada)
    bob = {"username": "bob", "email": "bob@example.com", "password": "password"}
    refused = await gateway.call("POST", "/api/v1/users", bob, credential=key["secret"])
    assert (refused.status, refused.body["code"]) == (403, "not_an_owner")


async def test_a_revoked_key_is_refused_on_every_instance_at_once(auth: Auth) -> None:
    gateway, other = await auth.start(), await auth.start()
    ada = await owner_of(gateway)
    key = await issue(gateway, ada)
    assert (await other.resolve(key["secret"])).principal is not None
    revoked = await gateway.call("DELETE", f"/api/v2/keys/{key['id']}", credential=ada)
    assert revoked.status == 200
    assert revoked.body["revoked_at"] is not None
    for instance in (gateway, other):
        resolved = await instance.resolve(key["secret"])
        assert (resolved.principal, resolved.reason) == (None, "revoked")
    history = await gateway.call("GET", f"/v2/keys/{key['id']}/history", credential=ada)
    assert [event["type"] for event in history.body["events"]] == ["api_key_revoked", "api_key_issued"]
    again = await gateway.call("DELETE", f"/api/v2/keys/{key['id']}", credential=ada)
    assert (again.status, again.body["revoked_at"]) == (200, revoked.body["revoked_at"])


async def test_a_key_expires_after_ninety_days_unless_told(auth: Auth) -> None:
    gateway = await auth.start()
    ada = await owner_of(gateway)
    standard, short = await issue(gateway, ada), await issue(gateway, ada, expires_in_days=1)
    auth.clock.advance(86_400)
    assert (await gateway.resolve(standard["secret"])).principal is not None
    assert (await gateway.resolve(short["secret"])).reason == "expired"
    auth.clock.advance(89 * 86_400)
    assert (await gateway.resolve(standard["secret"])).reason == "expired"


async def test_foreign_keys_are_not_there(gateway: Gateway) -> None:
    ada, eve = await owner_of(gateway, "ada"), await owner_of(gateway, "eve")
    key = await issue(gateway, ada)
    for method in ("GET", "DELETE"):
        answer = await gateway.call(method, f"/api/v2/keys/{key['id']}", credential=eve)
        assert (answer.status, answer.body["code"]) == (404, "key_not_found")
    assert (await gateway.call("GET", "/api/v2/keys", credential=eve)).body["keys"] == []
    assert (await gateway.call("GET", "/api/v2/keys?project_id=123", credential=eve)).status == 403
    planted = await gateway.call("POST", "/api/v2/keys", {"name": "x", "project_id": 123}, credential=eve)
    assert planted.status == 403
    assert (await gateway.resolve(key["secret"])).principal is not None


async def test_a_bad_field_of_a_key_is_refused_by_name(gateway: Gateway) -> None:
    bad: list[tuple[dict[str, Any], str]] = [
        ({"name": ""}, "name"),
        ({"name": "x" * 129}, "name"),
        ({"permission": "admin"}, "permission"),
        ({"scopes": ["sink:read"]}, "scopes[0]"),
        ({"permission": "read-only", "scopes": ["sync:write"]}, "scopes[0]"),
        ({"expires_in_days": 0}, "expires_in_days"),
        ({"expires_in_days": "90"}, "expires_in_days"),
        ({"colour": "red"}, "colour"),
    ]
    for fields, named in bad:
        answer = await gateway.call("POST", "/api/v2/keys", {"name": "ci", **fields}, credential=BOOTSTRAP_KEY)
        assert answer.status == 400, fields
        assert set(answer.body) >= {"error", "message", "code"}
        assert named in answer.body["message"]


async def test_lists_are_newest_first_in_pages(gateway: Gateway) -> None:
    ada = await owner_of(gateway)
    made = [(await issue(gateway, ada, name=f"key {n}"))["name"] for n in range(5)]
    seen: list[str] = []
    path: str | None = "/api/v2/keys?limit=2"
    while path is not None:
        page = (await gateway.call("GET", path, credential=ada)).body
        seen += [key["name"] for key in page["keys"]]
        path = page["next_page"]
    assert seen == made[::-1]


async def test_a_repeated_issue_is_answered_without_the_secret(gateway: Gateway) -> None:
    ada = await owner_of(gateway)
    headers = {"Idempotency-Key": "key-1"}
    answers = [
        await gateway.call("POST", "/api/v2/keys", {"name": "ci"}, credential=ada, headers=headers) for _ in range(2)
    ]
    assert [answer.status for answer in answers] == [201, 201]
    assert answers[0].body["id"] == answers[1].body["id"]
    assert answers[0].body["secret"]
    assert answers[1].body["secret"] is None
    assert len((await gateway.call("GET", "/api/v2/keys", credential=ada)).body["keys"]) == 1


async def test_uses_of_a_key_are_counted_lazily(auth: Auth) -> None:
    async with auth.started() as gateway:
        ada = await owner_of(gateway)
        key = await issue(gateway, ada)
        await asyncio.gather(*(gateway.resolve(key["secret"]) for _ in range(20)))
    gateway = await auth.start()
    shown = await gateway.call("GET", f"/api/v2/keys/{key['id']}", credential=ada)
    assert shown.body["uses"] == 20
    assert shown.body["last_used_at"] is not None
    events = await history(gateway.service.context.store, API_KEY.stream(key["id"]))
    assert [event.type for event in events] == ["api_key_issued"]


async def test_no_secret_is_kept_in_any_document_or_log(gateway: Gateway, capfd: pytest.CaptureFixture[str]) -> None:
    """Passwords, tokens and keys in clear are nowhere; their hashes are in their own collections alone."""
    password = "a password to look for"
    headers = {"Idempotency-Key": "signup"}
    body = {"username": "ada", "email": "ada@example.com", "password": password}
    await gateway.call("POST", "/signup", body, headers=headers)
    await gateway.log_in("ada", password + " mistyped")
    await gateway.log_in(password, password)
    session = (await gateway.log_in("ada", password)).data["token"]
    key = await issue(gateway, session)
    await gateway.resolve(key["secret"])
    rotated = await gateway.call("POST", f"/api/v2/keys/{key['id']}/rotate", {}, credential=session)
    client = await gateway.call("POST", "/api/v2/oauth/clients", {"name": "import"}, credential=session)
    form = {"grant_type": "client_credentials", **{k: client.body[k] for k in ("client_id", "client_secret")}}
    token = await gateway.token(form)
    await gateway.token({**form, "client_secret": form["client_secret"] + "x"})
    await gateway.resolve(token.body["access_token"])
    await gateway.call("PUT", "/api/v1/users/1", {"password": password + " 2"}, credential=session)
    await gateway.call("DELETE", f"/api/v2/keys/{key['id']}", credential=session)
    database = gateway.service.context.store.database
    texts = {}
    for name in await database.list_collection_names():
        documents = await database[name].find().to_list(None)
        texts[name] = orjson.dumps(documents, default=str).decode()
    written = capfd.readouterr()
    shown = (key["secret"], rotated.body["secret"], client.body["client_secret"], token.body["access_token"])
    for secret in (password, session, *shown, BOOTSTRAP_KEY):
        assert len(secret) > 8
        assert secret not in written.out + written.err
        assert [name for name, text in texts.items() if secret in text] == []
    for mark in ("$argon2id$", "api_key/", "oauth_client/", token_hash(client.body["client_secret"])):
        assert [name for name, text in texts.items() if mark in text] == ["secrets"]
    assert [name for name, text in texts.items() if token_hash(token.body["access_token"]) in text] == ["oauth_tokens"]
