"""What pages of other origins may do, and what may not be done with a cookie alone."""

import aiohttp
import pytest
from yarl import URL

from tests.integration.gateway.backends import PROJECT, SESSION
from tests.integration.gateway.conftest import Suite
from tests.integration.gateway.sockets import status_of

SOURCES = f"/api/v1/project/{PROJECT}/sources"
CANCEL = f"/api/v1/project/{PROJECT}/jobs/7/cancel"
ESCAPED = CANCEL.replace("cancel", "%63anc%65l")
ALLOWED = "http://localhost:8000"
FOREIGN = "https://evil.example"
COOKIE = {"Cookie": f"datasync_session={SESSION}"}


async def test_a_preflight_of_an_allowed_origin_needs_no_login(stranger: aiohttp.ClientSession) -> None:
    headers = {
        "Origin": ALLOWED,
        "Access-Control-Request-Method": "PUT",
        "Access-Control-Request-Headers": "content-type,authorization,idempotency-key",
    }
    async with stranger.options(SOURCES, headers=headers) as response:
        assert response.status == 204
        assert response.headers["Access-Control-Allow-Origin"] == ALLOWED
        assert response.headers["Access-Control-Allow-Credentials"] == "true"
        assert "PUT" in response.headers["Access-Control-Allow-Methods"]
        allowed = response.headers["Access-Control-Allow-Headers"].lower()
        assert {"content-type", "authorization", "idempotency-key"} <= set(allowed.split(", "))


async def test_a_preflight_of_another_origin_is_told_nothing(stranger: aiohttp.ClientSession) -> None:
    headers = {"Origin": FOREIGN, "Access-Control-Request-Method": "PUT"}
    async with stranger.options(SOURCES, headers=headers) as response:
        assert response.status == 204
        assert not [name for name in response.headers if name.startswith("Access-Control-")]


async def test_error_answers_carry_the_headers_that_let_a_page_read_them(
    suite: Suite, stranger: aiohttp.ClientSession
) -> None:
    await suite.catalog.backend.stop()
    for path, headers, status in (
        (SOURCES, {}, 401),
        ("/nowhere", {}, 404),
        (SOURCES, COOKIE, 503),
    ):
        async with stranger.get(path, headers={"Origin": ALLOWED, **headers}) as response:
            assert response.status == status
            assert response.headers["Access-Control-Allow-Origin"] == ALLOWED
            assert "X-Request-Id" in response.headers["Access-Control-Expose-Headers"]


async def test_an_answer_differs_by_origin_and_says_so(stranger: aiohttp.ClientSession) -> None:
    async with stranger.get(SOURCES, headers={"Origin": FOREIGN, **COOKIE}) as response:
        assert response.status == 200
        assert "Access-Control-Allow-Origin" not in response.headers
        assert "Origin" in response.headers["Vary"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": ALLOWED}, 200),
        ({"Referer": f"{ALLOWED}/sources/new"}, 200),
        ({"Sec-Fetch-Site": "same-origin"}, 200),
        ({"Origin": FOREIGN}, 403),
        ({"Referer": f"{FOREIGN}/{ALLOWED}"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "same-origin", "Origin": FOREIGN}, 403),
        ({"Sec-Fetch-Site": "none"}, 403),
        ({"Origin": "null"}, 403),
        ({}, 403),
    ],
)
@pytest.mark.parametrize(("method", "path"), [("POST", SOURCES), ("GET", CANCEL), ("POST", CANCEL), ("GET", ESCAPED)])
async def test_a_change_by_cookie_must_come_from_a_page_that_is_allowed(
    stranger: aiohttp.ClientSession, method: str, path: str, headers: dict[str, str], status: int
) -> None:
    async with stranger.request(method, URL(path, encoded=True), headers={**COOKIE, **headers}) as response:
        assert response.status == status
        if status == 403:
            assert (await response.json())["code"] == "origin_not_allowed"


@pytest.mark.parametrize("by", [COOKIE, {"Authorization": f"Bearer {SESSION}"}], ids=["cookie", "token"])
@pytest.mark.parametrize("path", [CANCEL, ESCAPED])
async def test_a_get_that_changes_something_is_not_served_to_head(
    stranger: aiohttp.ClientSession, path: str, by: dict[str, str]
) -> None:
    async with stranger.head(URL(path, encoded=True), headers={**by, "Origin": ALLOWED}) as response:
        assert response.status == 405
        assert set(response.headers["Allow"].split(",")) == {"GET", "POST"}


@pytest.mark.parametrize(
    "path",
    [
        CANCEL.replace("/jobs/", "//jobs/"),
        CANCEL.replace("/7/", "//7/"),
        f"{CANCEL}/",
        f"{CANCEL}%2f",
        CANCEL.replace("/jobs/", "/sources/../jobs/"),
        CANCEL.replace("/jobs/", "/sources/%2e%2e/jobs/"),
        CANCEL.replace("/cancel", "/./cancel"),
        CANCEL.replace("/cancel", "/%2e/cancel"),
        CANCEL.replace("/cancel", "%2fcancel"),
        CANCEL.replace("cancel", "CANCEL"),
        CANCEL.replace("cancel", "%2563ancel"),
        f"{CANCEL};x",
    ],
)
async def test_no_other_way_to_write_a_path_reaches_what_changes_something(
    stranger: aiohttp.ClientSession, path: str
) -> None:
    async with stranger.get(URL(path, encoded=True), headers={**COOKIE, "Origin": FOREIGN}) as response:
        assert response.status in (403, 404)


async def test_a_path_with_a_query_or_in_its_absolute_form_is_the_same_route(
    suite: Suite, stranger: aiohttp.ClientSession
) -> None:
    async with stranger.get(f"{CANCEL}?sync", headers={**COOKIE, "Origin": FOREIGN}) as response:
        assert response.status == 403
    wire = f"GET {suite.url}{CANCEL} HTTP/1.1\r\nHost: 127.0.0.1\r\nCookie: {COOKIE['Cookie']}\r\n\r\n"
    assert await status_of(suite.url, wire.encode()) in (403, 404)


async def test_the_gateways_own_origin_is_allowed(suite: Suite, stranger: aiohttp.ClientSession) -> None:
    async with stranger.post(SOURCES, headers={**COOKIE, "Origin": suite.url}) as response:
        assert response.status == 200


async def test_reading_by_cookie_needs_no_origin(stranger: aiohttp.ClientSession) -> None:
    async with stranger.get(SOURCES, headers=COOKIE) as response:
        assert response.status == 200


async def test_a_change_by_token_needs_no_origin(stranger: aiohttp.ClientSession) -> None:
    headers = {"Authorization": f"Bearer {SESSION}", "Origin": FOREIGN}
    async with stranger.post(SOURCES, headers=headers) as response:
        assert response.status == 200


async def test_the_literal_bearer_of_a_page_does_not_lift_the_rule(stranger: aiohttp.ClientSession) -> None:
    headers = {**COOKIE, "Authorization": "Bearer authenticated", "Origin": FOREIGN}
    async with stranger.post(SOURCES, headers=headers) as response:
        assert response.status == 403
