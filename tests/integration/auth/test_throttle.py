"""Failed logins have to wait, longer each time, and only those whom it concerns."""

import asyncio
from collections import Counter

from tests.integration.auth.auth_service import Answer, Auth, Gateway

LIMITS = {"login_free_attempts": 3, "login_free_attempts_per_address": 6}


async def fail(gateway: Gateway, username: str = "ada", address: str = "203.0.113.1") -> Answer:
    return await gateway.log_in(username, "not the password", address=address)


async def test_after_the_free_attempts_every_failure_doubles_the_wait(auth: Auth) -> None:
    gateway = await auth.start(login_free_attempts=3, login_delay_seconds_max=4)
    await gateway.sign_up()
    for _ in range(3):
        assert (await fail(gateway)).status == 401
    waits = []
    for _ in range(4):
        assert (await fail(gateway)).status == 401
        refused = await fail(gateway)
        assert (refused.status, refused.body["code"]) == (429, "login_throttled")
        waits.append(int(refused.headers["Retry-After"]))
        auth.clock.advance(waits[-1])
    assert waits == [1, 2, 4, 4]


async def test_the_right_password_waits_too_and_then_clears_the_count(auth: Auth) -> None:
    gateway = await auth.start(**LIMITS)
    await gateway.sign_up()
    for _ in range(4):
        await fail(gateway)
    assert (await gateway.log_in()).status == 429
    auth.clock.advance(1)
    assert (await gateway.log_in()).status == 200
    assert [(await fail(gateway, address="203.0.113.9")).status for _ in range(3)] == [401] * 3


async def test_the_right_password_is_let_through_where_its_user_logged_in_before(auth: Auth) -> None:
    """Strangers who know a name can't lock its user out, neither by account nor by an address that is shared."""
    gateway, home, stranger = await auth.start(**LIMITS), "203.0.113.7", "198.51.100.1"
    await gateway.sign_up()
    assert (await gateway.log_in(address=home)).status == 200
    await gateway.sign_up("eve")
    for address in (stranger, home):
        for n in range(8):
            await fail(gateway, "ada" if address == stranger else f"nobody-{n}", address)
    assert (await gateway.log_in(address="198.51.100.2")).status == 429
    assert (await gateway.log_in("eve", address=home)).status == 429
    assert (await gateway.log_in(address=home)).status == 200
    assert (await gateway.log_in(address=stranger)).status == 429


async def test_a_known_address_is_no_place_to_guess_from(auth: Auth) -> None:
    gateway = await auth.start(**LIMITS)
    await gateway.sign_up()
    await gateway.log_in()
    assert [(await fail(gateway)).status for _ in range(6)] == [401] * 4 + [429] * 2


async def test_the_switch_of_the_limits_turns_throttling_off(auth: Auth) -> None:
    gateway = await auth.start(**LIMITS, rate_limits=False)
    await gateway.sign_up()
    assert [(await fail(gateway)).status for _ in range(12)] == [401] * 12
    form = {"grant_type": "client_credentials", "client_id": "c", "client_secret": "wrong"}
    assert [(await gateway.token(form)).status for _ in range(12)] == [401] * 12


async def test_attempts_at_the_same_moment_get_no_further_than_one_after_another(auth: Auth) -> None:
    """On two instances: whatever comes in at once, only the free attempts and one more are looked at."""
    first, second = await auth.start(**LIMITS), await auth.start(**LIMITS)
    await first.sign_up()
    answers = await asyncio.gather(*(fail((first, second)[n % 2], address=f"203.0.113.{n}") for n in range(30)))
    assert Counter(answer.status for answer in answers) == {401: 4, 429: 26}


async def test_another_address_is_counted_for_itself(auth: Auth) -> None:
    gateway = await auth.start(**LIMITS)
    await gateway.sign_up()
    for n in range(7):
        assert (await fail(gateway, f"nobody-{n}", "198.51.100.1")).status == 401
    assert (await gateway.log_in(address="198.51.100.1")).status == 429
    assert (await gateway.log_in(address="198.51.100.2")).status == 200


async def test_successes_of_an_address_do_not_count(auth: Auth) -> None:
    gateway = await auth.start(**LIMITS)
    await gateway.sign_up()
    assert [(await gateway.log_in()).status for _ in range(10)] == [200] * 10


async def test_failures_are_forgotten_in_time(auth: Auth) -> None:
    gateway = await auth.start(**LIMITS)
    await gateway.sign_up()
    for _ in range(4):
        await fail(gateway)
    auth.clock.advance(2 * 3600)
    assert [(await fail(gateway)).status for _ in range(3)] == [401] * 3


async def test_an_unknown_name_is_answered_like_a_wrong_password(auth: Auth) -> None:
    gateway = await auth.start(**LIMITS)
    await gateway.sign_up()
    wrong, unknown = await fail(gateway, "ada"), await fail(gateway, "nobody")
    assert (wrong.status, wrong.body) == (unknown.status, unknown.body)
    for _ in range(3):
        wrong, unknown = await fail(gateway, "ada", "198.51.100.3"), await fail(gateway, "nobody", "198.51.100.4")
        assert (wrong.status, wrong.body) == (unknown.status, unknown.body)
    assert (await fail(gateway, "nobody", "198.51.100.4")).status == 429


async def test_no_name_that_was_typed_is_kept(auth: Auth) -> None:
    """People type their password into the wrong field."""
    gateway = await auth.start(**LIMITS)
    await fail(gateway, "my secret password")
    kept = await gateway.service.context.documents.plain("login_failures").find().to_list(None)
    assert kept
    assert "secret" not in str(kept)
