"""``datasync up`` starts, watches and stops the suite, and says plainly why it can't."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from libs.contracts.services import SERVICES
from libs.suite.child_process import free_port
from libs.testing.rest import rest
from libs.testing.servers import A_PROXY_THAT_IS_GONE
from libs.testing.suite import Suite

WAIT_SECONDS = 30.0


@pytest.fixture
def own_suite() -> Iterator[Suite]:
    """A suite that the test may stop."""
    with Suite() as suite:
        yield suite


def await_that(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.05)


def is_gone(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return True
    return state == "Z"


def datasync_up(directory: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-P", "-m", "libs.suite.cli", "up"],
        env={**os.environ, "DATA_DIR": str(directory), **environment},
        capture_output=True,
        text=True,
        timeout=WAIT_SECONDS,
        check=False,
        cwd=directory,
    )


def test_a_killed_service_comes_back_and_a_stopped_suite_leaves_nothing(own_suite: Suite) -> None:
    before = own_suite.processes()
    assert set(before) == {"mongod"} | {service.name for service in SERVICES}

    os.kill(before["catalog"], signal.SIGKILL)
    await_that(lambda: own_suite.processes().get("catalog", before["catalog"]) != before["catalog"])
    own_suite.await_ready()

    refused = datasync_up(own_suite.directory)
    assert refused.returncode == 1
    assert "already running" in refused.stderr
    assert f"process {own_suite.pid}" in refused.stderr

    children = own_suite.processes().values()
    assert own_suite.stop() == 0
    await_that(lambda: all(is_gone(pid) for pid in children))
    stops = [line["event"] for line in own_suite.log_lines() if line.get("service") == "supervisor"]
    assert stops[-2:] == ["stopping", "stopped"]


def test_children_die_with_a_killed_supervisor_and_the_next_start_finds_the_data(own_suite: Suite) -> None:
    children, key = own_suite.processes().values(), own_suite.api_key
    own_suite.kill()
    await_that(lambda: all(is_gone(pid) for pid in children))
    own_suite.start()
    assert own_suite.api_key == key
    assert own_suite.stop(signal.SIGINT) == 0


def test_a_taken_port_is_named_with_the_setting_that_moves_it(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refused = datasync_up(tmp_path, PORT=str(port), MONGODB_PORT=str(port))
    assert refused.returncode == 1
    assert f"port {port} is in use (set PORT to use another)" in refused.stderr
    assert "set MONGODB_PORT" in refused.stderr


def test_a_bad_setting_is_named_without_its_value(tmp_path: Path) -> None:
    refused = datasync_up(tmp_path, API_KEY="short", MONGODB_PORT="many")
    assert refused.returncode == 2
    assert "API_KEY" in refused.stderr
    assert "MONGODB_PORT" in refused.stderr
    assert "short" not in refused.stderr.replace("too short", "").replace("shorter", "")


def test_a_proxy_of_the_environment_is_not_asked_about_this_machine() -> None:
    """Start, readiness, a request that a service behind the gateway answers, and what goes to a collector."""
    with _collector() as (endpoint, pushed), Suite({**A_PROXY_THAT_IS_GONE, "OTLP_ENDPOINT": endpoint}) as suite:

        async def ask() -> int:
            async with rest(suite.base_url, api_key=suite.api_key) as api:
                return (await api.answer("GET", "/api/v1/project/123/sources")).status

        assert asyncio.run(ask()) == 200
        await_that(lambda: {"/v1/traces", "/v1/metrics"} <= set(pushed))


@contextmanager
def _collector() -> Iterator[tuple[str, list[str]]]:
    """An endpoint, and the paths that were posted to it."""
    pushed: list[str] = []

    class Taking(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            pushed.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Taking) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", pushed
        server.shutdown()


def test_the_keys_are_for_their_owner_alone(embedded_suite: Suite) -> None:
    for path in (embedded_suite.directory / "api_key", *(embedded_suite.directory / "keys").iterdir()):
        assert path.stat().st_mode & 0o077 == 0, path


def test_the_words_of_a_mongod_that_can_not_start_are_told_and_kept(tmp_path: Path) -> None:
    (tmp_path / "mongo").mkdir()
    (tmp_path / "mongo" / "WiredTiger.turtle").write_text("not a database")
    (tmp_path / "mongo" / "storage.bson").write_bytes(b"\0")
    ports = {f"{service.port_setting.upper()}": str(free_port()) for service in SERVICES}
    refused = datasync_up(tmp_path, MONGODB_PORT=str(free_port()), LOG_FORMAT="console", **ports)
    assert refused.returncode == 1
    assert "mongod logged: " in refused.stdout
    assert "storage" in refused.stdout.split("mongod logged: ", 1)[1].lower()
    assert (tmp_path / "logs" / "mongod.log").read_text()


def test_a_bad_setting_of_a_service_is_named_once_before_anything_starts(tmp_path: Path) -> None:
    ports = {f"{service.port_setting.upper()}": str(free_port()) for service in SERVICES}
    refused = datasync_up(tmp_path, MONGODB_PORT=str(free_port()), LOG_FORMAT="console", MAX_RETRIES="often", **ports)
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[0] == "datasync: bad settings"
    assert refused.stderr.count("MAX_RETRIES") == 1
    assert refused.stdout == ""
    assert list(tmp_path.iterdir()) == []
