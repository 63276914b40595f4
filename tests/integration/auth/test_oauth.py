"""OAuth 2.0 client credentials: RFC 6749 sections 2.3, 3.2, 4.4, 5.1 and 5.2."""

import base64
from collections import Counter
from typing import Any
from urllib.parse import quote_plus

import pytest

from tests.integration.auth.auth_service import Answer, Auth, Gateway
from tests.integration.auth.test_keys import issue, owner_of

GRANT = {"grant_type": "client_credentials"}


def basic(client_id: str, secret: str, *, scheme: str = "Basic") -> dict[str, str]:
    pair = f"{quote_plus(client_id)}:{quote_plus(secret)}"
    return {"Authorization": f"{scheme} {base64.b64encode(pair.encode()).decode()}"}


def in_body(client: dict[str, Any], **fields: str) -> dict[str, str]:
    return {**GRANT, "client_id": client["client_id"], "client_secret": client["client_secret"], **fields}


async def new_client(gateway: Gateway, credential: str, **fields: Any) -> dict[str, Any]:
    answer = await gateway.call("POST", "/api/v2/oauth/clients", {"name": "import", **fields}, credential=credential)
    assert answer.status == 201, answer.body
    body: dict[str, Any] = answer.body
    return body


def assert_refused(answer: Answer, status: int, error: str) -> None:
    assert (answer.status, answer.body["error"]) == (status, error), answer.body
    assert set(answer.body) == {"error", "error_description"}
    assert '"' not in answer.body["error_description"]
    assert answer.headers["Cache-Control"] == "no-store"
    if status == 401:
        assert answer.headers["WWW-Authenticate"] == 'Basic realm="datasync"'


async def test_a_client_gets_a_token_by_either_way_of_authentication(gateway: Gateway) -> None:
    client = await new_client(gateway, await owner_of(gateway), scopes=["sync:read", "sync:write"])
    id_and_secret = client["client_id"], client["client_secret"]
    answers = [
        await gateway.token(GRANT, headers=basic(*id_and_secret)),
        await gateway.token(GRANT, headers=basic(*id_and_secret, scheme="bAsIc")),
        await gateway.token({**GRANT, "client_id": client["client_id"]}, headers=basic(*id_and_secret)),
        await gateway.token(in_body(client)),
        await gateway.token(in_body(client, scope="", audience="ignored")),
    ]
    for answer in answers:
        assert answer.status == 200, answer.body
        assert (answer.headers["Cache-Control"], answer.headers["Pragma"]) == ("no-store", "no-cache")
        assert answer.headers["Content-Type"].startswith("application/json")
        assert set(answer.body) == {"access_token", "token_type", "expires_in", "scope"}
        assert answer.body["access_token"].startswith("ds_oat_")
        assert (answer.body["token_type"], answer.body["expires_in"]) == ("Bearer", 3600)
        assert answer.body["scope"] == "sync:read sync:write"
        resolved = await gateway.resolve(f"Bearer {answer.body['access_token']}")
        assert resolved.principal is not None
        assert (resolved.principal.kind, resolved.principal.subject) == ("oauth_client", client["client_id"])
        assert (resolved.principal.name, resolved.principal.projects) == ("import", {123: "member"})
    assert len({answer.body["access_token"] for answer in answers}) == len(answers)


async def test_a_scope_narrows_the_token(gateway: Gateway) -> None:
    ada = await owner_of(gateway)
    client = await new_client(gateway, ada)
    assert (await gateway.token(in_body(client))).body["scope"] == "*"
    narrow = await gateway.token(in_body(client, scope="sync:read keys:read"))
    assert narrow.body["scope"] == "sync:read keys:read"
    token = narrow.body["access_token"]
    assert (await gateway.call("GET", "/api/v2/keys", credential=token)).status == 200
    refused = await gateway.call("POST", "/api/v2/keys", {"name": "x"}, credential=token)
    assert (refused.status, refused.body["code"]) == (403, "read_only_credential")
    refused = await gateway.call("GET", "/api/v1/users", credential=token)
    assert (refused.status, refused.body["code"]) == (403, "insufficient_scope")
    assert refused.headers["WWW-Authenticate"] == (
        'Bearer realm="datasync", error="insufficient_scope", scope="users:read"'
    )


@pytest.mark.parametrize("scope", ["sync:write", "*", "sync:read sync:write", "no:such", 'a"b', " ", "sync:read  "])
async def test_more_than_the_client_holds_is_an_invalid_scope(gateway: Gateway, scope: str) -> None:
    client = await new_client(gateway, await owner_of(gateway), scopes=["sync:read"])
    assert_refused(await gateway.token(in_body(client, scope=scope)), 400, "invalid_scope")


async def test_every_malformed_request_has_the_error_of_the_rfc(gateway: Gateway) -> None:
    client = await new_client(gateway, await owner_of(gateway))
    id_and_secret = client["client_id"], client["client_secret"]
    good = in_body(client)
    wrong = {**good, "client_secret": good["client_secret"][:-1] + "x"}
    cases: list[tuple[Any, dict[str, str], int, str]] = [
        ({}, {}, 400, "invalid_request"),
        ({"client_id": good["client_id"]}, {}, 400, "invalid_request"),
        ({**good, "grant_type": ""}, {}, 400, "invalid_request"),
        ({**good, "grant_type": "password"}, {}, 400, "unsupported_grant_type"),
        ({**good, "grant_type": "authorization_code"}, {}, 400, "unsupported_grant_type"),
        ([*good.items(), ("grant_type", "client_credentials")], {}, 400, "invalid_request"),
        ([*good.items(), ("scope", "a"), ("scope", "b")], {}, 400, "invalid_request"),
        (b"grant_type=%ff%fe", {}, 400, "invalid_request"),
        (b"\xff\xfe", {}, 400, "invalid_request"),
        (b"&".join(b"a%d=1" % n for n in range(200)), {}, 400, "invalid_request"),
        (b'{"grant_type":"client_credentials"}', {"Content-Type": "application/json"}, 415, "invalid_request"),
        (good, basic(*id_and_secret), 400, "invalid_request"),
        ({**GRANT, "client_id": "another"}, basic(*id_and_secret), 400, "invalid_request"),
        (GRANT, {}, 401, "invalid_client"),
        ({**GRANT, "client_id": good["client_id"]}, {}, 401, "invalid_client"),
        (wrong, {}, 401, "invalid_client"),
        ({**good, "client_id": "nobody"}, {}, 401, "invalid_client"),
        ({**good, "client_id": "n\x00\U0001f600" * 300}, {}, 401, "invalid_client"),
        (GRANT, basic(good["client_id"], "wrong"), 401, "invalid_client"),
        (GRANT, {"Authorization": "Basic %%%"}, 401, "invalid_client"),
        (GRANT, {"Authorization": "Basic bm9jb2xvbg=="}, 401, "invalid_client"),
        (GRANT, {"Authorization": f"Bearer {good['client_secret']}"}, 401, "invalid_client"),
    ]
    for form, headers, status, error in cases:
        assert_refused(await gateway.token(form, headers=headers), status, error)
    assert_refused(await gateway.token(good, query="?client_secret=x"), 400, "invalid_request")
    assert (await gateway.token(good)).status == 200


async def test_a_token_ends_after_an_hour(auth: Auth) -> None:
    gateway = await auth.start()
    client = await new_client(gateway, await owner_of(gateway))
    token = (await gateway.token(in_body(client))).body["access_token"]
    auth.clock.advance(3599)
    assert (await gateway.resolve(token)).principal is not None
    auth.clock.advance(1)
    assert (await gateway.resolve(token)).reason == "expired"


async def test_a_revoked_client_and_its_tokens_are_refused_on_every_instance(auth: Auth) -> None:
    gateway, other = await auth.start(), await auth.start()
    ada = await owner_of(gateway)
    client = await new_client(gateway, ada)
    token = (await gateway.token(in_body(client))).body["access_token"]
    assert (await other.resolve(token)).principal is not None
    path = f"/api/v2/oauth/clients/{client['id']}"
    revoked = await gateway.call("DELETE", path, credential=ada)
    assert (revoked.status, revoked.body["revoked_at"] is not None) == (200, True)
    for instance in (gateway, other):
        assert (await instance.resolve(token)).reason == "revoked"
        assert_refused(await instance.token(in_body(client)), 401, "invalid_client")
    again = await gateway.call("DELETE", path, credential=ada)
    assert (again.status, again.body["revoked_at"]) == (200, revoked.body["revoked_at"])
    history = await gateway.call("GET", f"{path}/history", credential=ada)
    assert [event["type"] for event in history.body["events"]] == ["oauth_client_revoked", "oauth_client_issued"]


async def test_clients_are_listed_without_secrets_in_their_own_project(auth: Auth) -> None:
    async with auth.started() as gateway:
        ada, eve = await owner_of(gateway), await owner_of(gateway, "eve")
        made = [await new_client(gateway, ada, name=f"client {n}") for n in range(3)]
        token = (await gateway.token(in_body(made[0]))).body["access_token"]
        await gateway.resolve(token)
    gateway = await auth.start()
    listed = await gateway.call("GET", "/v2/oauth/clients?limit=2", credential=ada)
    rest = await gateway.call("GET", listed.body["next_page"], credential=ada)
    shown = [*listed.body["clients"], *rest.body["clients"]]
    assert [client["name"] for client in shown] == ["client 2", "client 1", "client 0"]
    assert (shown[2]["uses"], shown[2]["last_used_at"] is not None) == (1, True)
    for client in made:
        assert client["client_secret"] not in f"{listed.body}{rest.body}"
    one = await gateway.call("GET", f"/api/v2/oauth/clients/{made[0]['id']}", credential=ada)
    assert (one.status, one.body) == (200, shown[2])
    assert (await gateway.call("GET", "/api/v2/oauth/clients", credential=eve)).body["clients"] == []
    for method in ("GET", "DELETE"):
        answer = await gateway.call(method, f"/api/v2/oauth/clients/{made[0]['id']}", credential=eve)
        assert (answer.status, answer.body["code"]) == (404, "client_not_found")


async def test_a_client_is_granted_no_more_than_its_issuer_holds(gateway: Gateway) -> None:
    ada = await owner_of(gateway)
    narrow = await issue(gateway, ada, scopes=["keys:write", "sync:read"])
    for scopes in (None, ["*"], ["sync:write"]):
        body = {"name": "wide", "scopes": scopes}
        refused = await gateway.call("POST", "/api/v2/oauth/clients", body, credential=narrow["secret"])
        assert refused.status == 403
    assert (await new_client(gateway, narrow["secret"], scopes=["sync:read"]))["scopes"] == ["sync:read"]
    bad = await gateway.call("POST", "/api/v2/oauth/clients", {"name": "x", "scopes": ["sink:read"]}, credential=ada)
    assert (bad.status, "scopes[0]" in bad.body["message"]) == (400, True)


async def test_a_client_bound_to_a_developer_gets_tokens_of_that_developer(gateway: Gateway) -> None:
    client = await new_client(gateway, await owner_of(gateway), developer_id="dev-1")
    resolved = await gateway.resolve((await gateway.token(in_body(client))).body["access_token"])
    assert resolved.principal is not None
    assert resolved.principal.developer_id == "dev-1"


async def test_a_repeated_issue_is_answered_without_the_secret(gateway: Gateway) -> None:
    ada = await owner_of(gateway)
    headers = {"Idempotency-Key": "client-1"}
    first, again = [
        await gateway.call("POST", "/api/v2/oauth/clients", {"name": "x"}, credential=ada, headers=headers)
        for _ in range(2)
    ]
    assert (first.body["id"], again.body["client_secret"]) == (again.body["id"], None)
    assert (await gateway.token(in_body(first.body))).status == 200


async def test_wrong_secrets_are_throttled_and_lock_nobody_out(auth: Auth) -> None:
    gateway = await auth.start(login_free_attempts=3, login_free_attempts_per_address=6)
    client = await new_client(gateway, await owner_of(gateway))
    wrong = in_body(client, client_secret="wrong")
    answers = [await gateway.token(wrong, address=f"198.51.100.{n}") for n in range(8)]
    assert Counter(answer.status for answer in answers) == {401: 4, 429: 4}
    assert_refused(answers[-1], 429, "too_many_requests")
    assert int(answers[-1].headers["Retry-After"]) >= 1
    by_address = [await gateway.token({**wrong, "client_id": f"nobody {n}"}) for n in range(10)]
    assert Counter(answer.status for answer in by_address) == {401: 7, 429: 3}
    assert (await gateway.token(in_body(client))).status == 200
    auth.clock.advance(1)
    assert (await gateway.token(wrong, address="198.51.100.77")).status == 401
