"""The members of a project, and what its owner and they themselves may do."""

from typing import Any

from tests.integration.auth.auth_service import BOOTSTRAP_KEY, Auth, Gateway

BOB = {"username": "bob", "email": "bob@example.com", "password": "bobs password"}


async def owner_of(gateway: Gateway, username: str = "ada") -> str:
    await gateway.sign_up(username)
    return await gateway.session_of(username)


async def names(gateway: Gateway, credential: str) -> list[str]:
    answer = await gateway.call("GET", "/api/v1/users", credential=credential)
    return [user["username"] for user in answer.data]


async def test_an_owner_adds_a_member_who_can_log_in(gateway: Gateway) -> None:
    ada = await owner_of(gateway)
    added = await gateway.call("POST", "/api/v1/users", BOB, credential=ada)
    assert added.status == 200
    assert (added.data["username"], added.data["email"]) == ("bob", "bob@example.com")
    resolved = await gateway.resolve((await gateway.log_in("bob", "bobs password")).data["token"])
    assert resolved.principal is not None
    assert resolved.principal.projects == {123: "member"}
    assert await names(gateway, ada) == ["bob", "ada"]


async def test_users_of_other_projects_are_not_seen_nor_touched(gateway: Gateway) -> None:
    ada, eve = await owner_of(gateway, "ada"), await owner_of(gateway, "eve")
    assert await names(gateway, ada) == ["ada"]
    assert await names(gateway, eve) == ["eve"]
    change = await gateway.call("PUT", "/api/v1/users/1", {"password": "eves password"}, credential=eve)
    assert change.status == 404
    removal = await gateway.call("DELETE", "/api/v1/users/1", credential=eve)
    assert removal.status == 404
    forced = await gateway.call("DELETE", "/api/v1/users/1?project_id=123", credential=eve)
    assert forced.status == 404
    planted = await gateway.call("POST", "/api/v1/users", {**BOB, "project_id": 123}, credential=eve)
    assert planted.status == 403


async def test_a_member_may_neither_add_nor_remove_nor_change_others(gateway: Gateway) -> None:
    ada = await owner_of(gateway)
    await gateway.call("POST", "/api/v1/users", BOB, credential=ada)
    bob = (await gateway.log_in("bob", "bobs password")).data["token"]
    attempts: list[tuple[str, str, Any]] = [
        ("POST", "/api/v1/users", {**BOB, "username": "carl", "email": "carl@example.com"}),
        ("DELETE", "/api/v1/users/1", None),
        ("PUT", "/api/v1/users/1", {"password": "bobs own now"}),
    ]
    for method, path, body in attempts:
        answer = await gateway.call(method, path, body, credential=bob)
        assert (answer.status, answer.body["code"]) == (403, "not_an_owner")


async def test_a_removed_member_loses_the_project_at_once(auth: Auth) -> None:
    gateway, other = await auth.start(), await auth.start()
    ada = await owner_of(gateway)
    added = await gateway.call("POST", "/api/v1/users", BOB, credential=ada)
    bob = (await gateway.log_in("bob", "bobs password")).data["token"]
    removed = await gateway.call("DELETE", f"/api/v1/users/{added.data['id']}", credential=ada)
    assert removed.data == {"id": added.data["id"], "username": "bob"}
    resolved = await other.resolve(bob)
    assert resolved.principal is not None
    assert resolved.principal.projects == {}
    assert await names(gateway, ada) == ["ada"]


async def test_a_user_shows_its_past(auth: Auth) -> None:
    gateway = await auth.start()
    ada = await owner_of(gateway)
    before = auth.clock.now()
    auth.clock.advance(60)
    await gateway.call("PUT", "/api/v1/users/1", {"email": "countess@example.com"}, credential=ada)
    events = (await gateway.call("GET", "/api/v1/users/1/history", credential=ada)).data
    assert [(event["version"], event["type"]) for event in events] == [(2, "user_updated"), (1, "user_signed_up")]
    now = await gateway.call("GET", "/api/v1/users/1", credential=ada)
    assert (now.data["email"], now.headers["ETag"]) == ("countess@example.com", '"2"')
    moment = before.isoformat().replace("+00:00", "Z")
    then = await gateway.call("GET", f"/api/v1/users/1?as_of={moment}", credential=ada)
    assert then.data["email"] == "ada@example.com"


async def test_the_last_owner_can_not_be_removed(gateway: Gateway) -> None:
    ada = await owner_of(gateway)
    answer = await gateway.call("DELETE", "/api/v1/users/1", credential=ada)
    assert (answer.status, answer.body["code"]) == (409, "last_owner")


async def test_a_changed_password_ends_every_other_session_at_once(auth: Auth) -> None:
    gateway, other = await auth.start(), await auth.start()
    ada = await owner_of(gateway)
    elsewhere = await gateway.session_of()
    changed = await gateway.call(
        "PUT", "/api/v1/users/1", {"password": "a new password", "current_password": "password"}, credential=ada
    )
    assert changed.status == 200
    assert (await other.resolve(ada)).principal is not None
    assert (await other.resolve(elsewhere)).reason == "revoked"
    assert (await other.log_in("ada", "password")).status == 401
    assert (await other.log_in("ada", "a new password")).status == 200


async def test_an_owner_sets_a_members_password(gateway: Gateway) -> None:
    ada = await owner_of(gateway)
    added = await gateway.call("POST", "/api/v1/users", BOB, credential=ada)
    path = f"/api/v1/users/{added.data['id']}"
    changed = await gateway.call("PUT", path, {**BOB, "password": "set by ada"}, credential=ada)
    assert changed.status == 200
    assert (await gateway.log_in("bob", "set by ada")).status == 200
    assert (await gateway.resolve(ada)).principal is not None


async def test_an_email_address_is_changed_unless_it_is_taken(gateway: Gateway) -> None:
    ada = await owner_of(gateway)
    await owner_of(gateway, "eve")
    taken = await gateway.call("PUT", "/api/v1/users/1", {"email": "EVE@example.com"}, credential=ada)
    assert (taken.status, taken.message) == (409, "the email is already taken")
    changed = await gateway.call("PUT", "/api/v1/users/1", {"email": "countess@example.com"}, credential=ada)
    assert changed.data["email"] == "countess@example.com"
    assert (await gateway.log_in("countess@example.com")).status == 200
    assert (await gateway.sign_up("new", email="ada@example.com")).status == 200


async def test_a_change_on_an_outdated_version_is_refused(gateway: Gateway) -> None:
    ada = await owner_of(gateway)
    body = {"email": "countess@example.com", "password": "a new password", "current_password": "password"}
    stale = await gateway.call("PUT", "/api/v1/users/1", body, credential=ada, headers={"If-Match": '"7"'})
    assert stale.status == 412
    current = await gateway.call("PUT", "/api/v1/users/1", body, credential=ada, headers={"If-Match": '"1"'})
    assert (current.status, current.headers["ETag"]) == (200, '"3"')


async def test_a_username_stays(gateway: Gateway) -> None:
    ada = await owner_of(gateway)
    answer = await gateway.call("PUT", "/api/v1/users/1", {"username": "countess"}, credential=ada)
    assert answer.status == 400
    assert "username" in answer.message


async def test_the_bootstrap_key_makes_the_first_owner_where_signup_is_closed(auth: Auth) -> None:
    gateway = await auth.start(auth_signup="invite")
    added = await gateway.call("POST", "/api/v1/users", BOB, credential=BOOTSTRAP_KEY)
    assert added.status == 200
    resolved = await gateway.resolve((await gateway.log_in("bob", "bobs password")).data["token"])
    assert resolved.principal is not None
    assert resolved.principal.projects == {123: "owner"}
    carl = {"username": "carl", "email": "carl@example.com", "password": "carls password"}
    assert (await gateway.call("POST", "/api/v1/users", carl, credential=BOOTSTRAP_KEY)).status == 200
    assert await names(gateway, BOOTSTRAP_KEY) == ["carl", "bob"]


async def test_a_user_lists_the_projects(gateway: Gateway) -> None:
    ada = await owner_of(gateway)
    [project] = (await gateway.call("GET", "/api/v1/projects", credential=ada)).data
    assert (project["id"], project["name"], project["role"]) == (123, "ada's project", "owner")


async def test_a_projects_history_and_as_of_show_who_was_a_member(auth: Auth) -> None:
    gateway = await auth.start()
    early = await gateway.call("GET", "/api/v1/projects/123", credential=BOOTSTRAP_KEY)
    assert early.status == 404
    ada = await owner_of(gateway)
    auth.clock.advance(60)
    assert (await gateway.call("POST", "/api/v1/users", BOB, credential=ada)).status == 200
    project = (await gateway.call("GET", "/api/v1/projects/123", credential=ada)).data
    assert [member["role"] for member in project["members"]] == ["owner", "member"]
    events = (await gateway.call("GET", "/api/v1/projects/123/history", credential=ada)).data
    assert [event["type"] for event in events] == ["member_added", "member_added", "project_created"]
    path = f"/api/v1/projects/123?as_of={events[1]['time']}"
    assert len((await gateway.call("GET", path, credential=ada)).data["members"]) == 1
    for foreign in ("/api/v1/projects/124", "/api/v1/projects/124/history"):
        assert (await gateway.call("GET", foreign, credential=ada)).status == 403


async def test_an_added_user_is_answered_again_for_the_same_idempotency_key(gateway: Gateway) -> None:
    ada = await owner_of(gateway)
    headers = {"Idempotency-Key": "add-bob"}
    first = await gateway.call("POST", "/api/v1/users", BOB, credential=ada, headers=headers)
    second = await gateway.call("POST", "/api/v1/users", BOB, credential=ada, headers=headers)
    assert (first.status, first.data) == (second.status, second.data)
    other = {**BOB, "password": "another password"}
    assert (await gateway.call("POST", "/api/v1/users", other, credential=ada, headers=headers)).status == 422


async def test_changing_ones_own_password_takes_the_present_one(gateway: Gateway) -> None:
    """Who finds a session open, or steals one, does not take the account over."""
    ada = await owner_of(gateway)
    for given, code in ((None, "required"), ("guessed wrong", "wrong_password")):
        body = {"password": "a new password", "current_password": given}
        refused = await gateway.call("PUT", "/api/v1/users/1", body, credential=ada)
        assert (refused.status, refused.body["errors"][0]["field"]) == (400, "current_password")
        assert refused.body["errors"][0]["code"] == code
    assert (await gateway.log_in("ada", "a new password")).status == 401
    assert (await gateway.log_in("ada", "password")).status == 200


async def test_present_passwords_can_not_be_guessed_by_changing_them(auth: Auth) -> None:
    gateway = await auth.start(login_free_attempts=3)
    ada = await owner_of(gateway)
    body = {"password": "a new password", "current_password": "guessed wrong"}
    guesses = [(await gateway.call("PUT", "/api/v1/users/1", body, credential=ada)).status for _ in range(6)]
    assert guesses == [400] * 4 + [429] * 2


async def test_credentials_end_with_the_membership_of_who_made_them(auth: Auth) -> None:
    gateway, other = await auth.start(), await auth.start()
    ada = await owner_of(gateway)
    added = await gateway.call("POST", "/api/v1/users", BOB, credential=ada)
    bob = (await gateway.log_in("bob", "bobs password")).data["token"]
    kept = (await gateway.call("POST", "/api/v2/keys", {"name": "adas"}, credential=ada)).body["secret"]
    direct = (await gateway.call("POST", "/api/v2/keys", {"name": "bobs"}, credential=bob)).body
    derived = (await gateway.call("POST", "/api/v2/keys", {"name": "next"}, credential=direct["secret"])).body
    client = (await gateway.call("POST", "/api/v2/oauth/clients", {"name": "c"}, credential=derived["secret"])).body
    form = {
        "grant_type": "client_credentials",
        "client_id": client["client_id"],
        "client_secret": client["client_secret"],
    }
    token = (await gateway.token(form)).body["access_token"]
    presented = [direct["secret"], derived["secret"], token]
    assert all([(await other.resolve(credential)).principal is not None for credential in presented])
    await gateway.call("DELETE", f"/api/v1/users/{added.data['id']}", credential=ada)
    assert [(await other.resolve(credential)).reason for credential in presented] == ["revoked"] * 3
    assert (await gateway.token(form)).status == 401
    assert (await other.resolve(kept)).principal is not None
    listed = (await gateway.call("GET", "/api/v2/keys", credential=ada)).body["keys"]
    assert {key["name"]: key["revoked_at"] is not None for key in listed} == {"adas": False, "bobs": True, "next": True}
