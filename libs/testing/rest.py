"""The REST API as a person or a program calls it: over the gateway, with a session or a key."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp

ORIGIN = "http://localhost:8000"
"""An origin that the gateway allows; calls by cookie that change something need one."""

ENDED = ("completed", "failed", "canceled")

READS = {
    "auth": "/api/v2/keys",
    "catalog": "/api/v1/project/123/sources",
    "record_sync": "/api/v1/sync/records",
    "job_orchestrator": "/api/v1/project/123/jobs",
    "worker": "/api/v1/project/123/jobs",
    "gateway": "/api/v1/sync/records",
}
"""For each service a path whose GET needs it, or goes on without it."""


class CallFailed(Exception):
    """An answer that was not the expected success."""

    def __init__(self, method: str, path: str, status: int, body: Any) -> None:
        message = body.get("message") if isinstance(body, dict) else body
        super().__init__(f"{method} {path} answered {status}: {message}")
        self.status = status
        self.body = body


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: Any

    @property
    def data(self) -> Any:
        """What the project family's envelope holds."""
        return self.body["data"]


class Rest:
    """A client with a cookie jar.

    Args:
        base_url: the gateway's.
        project_id: whose paths ``project`` calls.
        api_key: sent as a bearer token; without it a session's cookie is, once ``login`` was called.
    """

    def __init__(self, session: aiohttp.ClientSession, base_url: str, project_id: int, api_key: str | None) -> None:
        self._session = session
        self._base_url = base_url
        self.project_id = project_id
        self._headers = {"Origin": ORIGIN} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})

    async def answer(
        self, method: str, path: str, body: Any = None, *, headers: Mapping[str, str] | None = None, **query: Any
    ) -> Answer:
        """The answer, whatever its status."""
        params = {key: str(value) for key, value in query.items()}
        sent_headers = {**self._headers, **(headers or {})}
        url = self._base_url + path
        async with self._session.request(method, url, json=body, params=params, headers=sent_headers) as response:
            is_json = response.content_type.endswith("json")
            content = await response.json() if is_json else await response.text()
            return Answer(response.status, response.headers, content)

    async def call(self, method: str, path: str, body: Any = None, **query: Any) -> Any:
        """The ``data`` of a successful answer.

        Raises:
            CallFailed: the answer was no success.
        """
        answer = await self.answer(method, path, body, **query)
        if answer.status != 200 or not isinstance(answer.body, dict) or answer.body.get("success") is not True:
            raise CallFailed(method, path, answer.status, answer.body)
        return answer.data

    async def project(self, method: str, path: str, body: Any = None, **query: Any) -> Any:
        """``call`` below the project's root: ``sources``, ``jobs/7/sync``."""
        return await self.call(method, f"/api/v1/project/{self.project_id}/{path}", body, **query)

    async def sign_up_and_log_in(self, username: str, password: str) -> None:
        """Make an account and hold its session."""
        email = f"{username}@example.com"
        await self.call("POST", "/signup", {"email": email, "username": username, "password": password})
        await self.call("POST", "/login", {"username": username, "password": password})

    async def newest_task(self, job_id: int) -> dict[str, Any]:
        """The job's latest run."""
        tasks = await self.project("GET", f"jobs/{job_id}/tasks")
        task: dict[str, Any] = tasks[0]
        return task


@asynccontextmanager
async def rest(base_url: str, *, project_id: int = 123, api_key: str | None = None) -> AsyncIterator[Rest]:
    """An open client."""
    # Cookies of a bare IP address are kept only by a jar that is told to.
    jar = aiohttp.CookieJar(unsafe=True)
    timeout = aiohttp.ClientTimeout(total=90)
    async with aiohttp.ClientSession(cookie_jar=jar, timeout=timeout) as session:
        yield Rest(session, base_url, project_id, api_key)


def selected(catalog: Mapping[str, Any], sync_mode: str = "full_refresh") -> dict[str, Any]:
    """A discovered catalog with every stream chosen in ``sync_mode``: what a job's ``streams_config`` wants."""
    streams = [{**entry, "stream": {**entry["stream"], "sync_mode": sync_mode}} for entry in catalog["streams"]]
    chosen: dict[str, list[dict[str, Any]]] = {}
    for entry in streams:
        stream = entry["stream"]
        chosen.setdefault(stream["namespace"], []).append(
            {"stream_name": stream["name"], "partition_regex": "", "normalization": True, "append_mode": False}
        )
    return {"selected_streams": chosen, "streams": streams}
