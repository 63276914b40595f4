"""Everything is killed at some moment; what was acknowledged stays, and runs come to their end."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any

import aiohttp
import asyncpg
import pytest

from libs.contracts.services import SERVICES
from libs.suite.child_process import die_with_parent, free_port
from libs.suite.settings import SuiteSettings, load_keys, service_environment
from libs.testing.databases import postgres_config
from libs.testing.rest import Rest, rest
from libs.testing.servers import Kafka
from libs.testing.suite import Suite
from libs.testing.walks import Walk
from tests.e2e.conftest import QUICK
from tests.e2e.replication import (
    await_end,
    execute,
    log_lines,
    make_endpoint,
    make_job,
    newest_run,
    rows_of,
    sync,
    unique,
)
from tests.e2e.stores import head_position, projected, stored_events

WRITERS = 6
BETWEEN_KILLS_SECONDS = 0.5
SETTLED_WITHIN_SECONDS = 60.0
STALLED_SECONDS = 12.0
LEAVES_AFTER_SECONDS = 0.2
RECORDS = "/api/v1/sync/records"
ROWS = 800_000
HELD_READ = "public.held: reading"
SUMMARY = "SELECT count(*), count(DISTINCT id), sum(hashtext(t::text)::bigint) FROM many t"


@contextmanager
def suite_on(kind: str) -> Iterator[tuple[Suite, Kafka | None]]:
    """A suite that may be broken, on a log that may be."""
    if kind == "embedded":
        with Suite(QUICK) as suite:
            yield suite, None
    else:
        with Kafka() as kafka, Suite({**QUICK, "KAFKA_BOOTSTRAP_SERVERS": kafka.bootstrap_servers}) as suite:
            yield suite, kafka


async def create_until_told(suite: Suite, body: dict[str, Any], stop: asyncio.Event, made: dict[str, int]) -> None:
    """Make sources one after the other, each repeated with its Idempotency-Key until it is acknowledged."""
    async with rest(suite.base_url, api_key=suite.api_key) as api:
        while not stop.is_set():
            name = unique("source")
            made[name] = await _created(api, {**body, "name": name})


async def _created(api: Rest, body: dict[str, Any]) -> int:
    deadline = time.monotonic() + SETTLED_WITHIN_SECONDS
    headers = {"Idempotency-Key": body["name"]}
    while True:
        with suppress(aiohttp.ClientError, TimeoutError):
            answer = await api.answer("POST", f"/api/v1/project/{api.project_id}/sources", body, headers=headers)
            if answer.status == 200:
                identifier: int = answer.data["id"]
                return identifier
            # Anything else than "later" would be a wrong answer to a good request.
            assert answer.status >= 500 or answer.status in (409, 429), answer
            assert answer.status != 409 or "Idempotency-Key" in str(answer.body) or "running" in str(answer.body), (
                answer
            )
        assert time.monotonic() < deadline, f"{body['name']} was never acknowledged"
        await asyncio.sleep(0.1)


async def eventually(condition: Any, what: str) -> None:
    """Wait until ``condition`` holds."""
    try:
        async with asyncio.timeout(SETTLED_WITHIN_SECONDS):
            while not await asyncio.to_thread(condition):
                await asyncio.sleep(0.1)
    except TimeoutError:
        pytest.fail(f"not in time: {what}")


async def test_no_acknowledged_command_is_lost_whatever_is_killed(event_log_kind: str, walk: Walk) -> None:
    with suite_on(event_log_kind) as (suite, kafka):
        async with rest(suite.base_url, api_key=suite.api_key) as api:
            version = (await api.project("GET", "sources/versions", type="postgres"))["version"][0]
        config = {"host": "127.0.0.1", "port": 1, "database": "d", "username": "u", "password": "p"}
        body = {"type": "postgres", "version": version, "config": config}
        stop, made = asyncio.Event(), dict[str, int]()
        async with asyncio.TaskGroup() as writers:
            for _ in range(WRITERS):
                writers.create_task(create_until_told(suite, body, stop, made))
            for _ in range(walk.rounds(1, 10)):
                await _kill_everything_once(suite, kafka, walk)
            stop.set()

        async with rest(suite.base_url, api_key=suite.api_key) as api:
            listed = {source["name"]: source["id"] for source in await api.project("GET", "sources")}
        assert listed == made
        assert len(made) >= WRITERS
        events = stored_events(suite, "catalog")
        assert [event["position"] for event in events] == list(range(1, head_position(suite, "catalog") + 1))
        await eventually(
            lambda: set(projected(suite, "job_orchestrator", "sources")) == set(made.values()),
            "the orchestrator knows every source",
        )
        for service in ("catalog", "job_orchestrator"):
            compared = await asyncio.to_thread(suite.command, "rebuild", service, "--compare")
            assert compared.returncode == 0, compared.stdout + compared.stderr


async def test_faults_of_the_store_leave_no_error_that_nobody_handled(walk: Walk) -> None:
    """While mongod is stalled and killed, callers write, read, poll and leave, and a service is stopped."""
    with Suite(QUICK) as suite:
        async with rest(suite.base_url, api_key=suite.api_key) as api:
            version = (await api.project("GET", "sources/versions", type="postgres"))["version"][0]
        config = {"host": "127.0.0.1", "port": 1, "database": "d", "username": "u", "password": "p"}
        body = {"type": "postgres", "version": version, "config": config}
        stop, made = asyncio.Event(), dict[str, int]()
        async with asyncio.TaskGroup() as callers:
            for _ in range(WRITERS):
                callers.create_task(create_until_told(suite, body, stop, made))
            for path in (f"{RECORDS}/changes?after=latest&timeout=2", RECORDS, "/api/v1/project/123/jobs", "/auth"):
                callers.create_task(_ask_until_told(suite, path, 90, stop))
                callers.create_task(_ask_until_told(suite, path, LEAVES_AFTER_SECONDS, stop))
            for number, held_seconds in ((signal.SIGSTOP, STALLED_SECONDS), (signal.SIGKILL, 0)) * walk.rounds(2, 10):
                await asyncio.sleep(BETWEEN_KILLS_SECONDS)
                await eventually(lambda: "mongod" in suite.processes(), "mongod is up")
                pid = suite.processes()["mongod"]
                os.kill(pid, number)
                await asyncio.sleep(held_seconds)
                if number == signal.SIGSTOP:
                    os.kill(suite.processes()["catalog"], signal.SIGTERM)
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
                await asyncio.to_thread(suite.await_ready)
            stop.set()
        assert suite.stop() == 0
        lines = suite.log_path.read_text(errors="replace").splitlines()
        words = (
            "never retrieved",
            "Traceback",
            "Unclosed",
            "was never awaited",
            "was destroyed but",
            "request_crashed",
        )
        assert [line[:2000] for line in lines if any(word in line for word in words)] == []
        assert made


async def _ask_until_told(suite: Suite, path: str, patience_seconds: float, stop: asyncio.Event) -> None:
    async with rest(suite.base_url, api_key=suite.api_key) as api:
        while not stop.is_set():
            with suppress(aiohttp.ClientError, TimeoutError):
                async with asyncio.timeout(patience_seconds):
                    await api.answer("GET", path)
            await asyncio.sleep(0.05)


async def _kill_everything_once(suite: Suite, kafka: Kafka | None, walk: Walk) -> None:
    victims = ["mongod", *(service.name for service in SERVICES), *(["kafka"] if kafka else [])]
    walk.random.shuffle(victims)
    for victim in victims:
        await asyncio.sleep(BETWEEN_KILLS_SECONDS)
        if victim == "kafka":
            assert kafka is not None
            await asyncio.to_thread(kafka.kill)
            await asyncio.to_thread(kafka.start)
        else:
            await eventually(lambda name=victim: name in suite.processes(), f"{victim} is up")
            os.kill(suite.processes()[victim], signal.SIGKILL)
    await asyncio.to_thread(suite.await_ready)


async def started_run(api: Rest, source_dsn: str, replica: str) -> int:
    """A job whose run moves rows at this moment."""
    await execute(
        source_dsn,
        f"CREATE TABLE many AS SELECT n AS id, md5(n::text) AS name FROM generate_series(1, {ROWS}) n;"
        " ALTER TABLE many ADD PRIMARY KEY (id)",
    )
    source = await make_endpoint(api, "sources", "postgres", postgres_config(source_dsn))
    destination = await make_endpoint(api, "destinations", "postgres", postgres_config(replica))
    job_id = await make_job(api, source, destination)
    await api.project("POST", f"jobs/{job_id}/sync", {})
    moved = "SELECT coalesce(sum(tuples_processed), 0) FROM pg_stat_progress_copy"
    async with asyncio.timeout(30):
        while (await rows_of(replica, moved)) == [(0,)]:
            await asyncio.sleep(0.01)
    return job_id


@pytest.mark.parametrize(
    ("kind", "victim"),
    [
        ("embedded", "worker"),
        ("embedded", "job_orchestrator"),
        ("embedded", "mongod"),
        pytest.param("kafka", "worker", marks=pytest.mark.kafka),
    ],
)
async def test_a_run_ends_with_every_row_once_when_it_loses(
    kind: str, victim: str, request: pytest.FixtureRequest, postgres_database: str, replica: str
) -> None:
    suite: Suite = request.getfixturevalue(f"{kind}_suite")
    async with rest(suite.base_url, api_key=suite.api_key) as api:
        job_id = await started_run(api, postgres_database, replica)
        os.kill(suite.processes()[victim], signal.SIGKILL)
        await asyncio.to_thread(suite.await_ready)

        run = await await_end(api, job_id)

        assert run["status"] == "completed", run
        assert await rows_of(replica, SUMMARY) == await rows_of(postgres_database, SUMMARY)


@contextmanager
def second_worker(suite: Suite) -> Iterator[None]:
    """Another worker beside the suite's own."""
    settings = SuiteSettings.model_validate({**suite.settings, "data_dir": suite.directory})
    worker = next(service for service in SERVICES if service.name == "worker")
    environment = service_environment(worker, settings, load_keys(suite.directory, settings), suite.mongodb_url)
    environment |= {key.upper(): value for key, value in suite.settings.items() if key not in ("host", "port")}
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "services.worker"],
        env={**environment, "PORT": str(free_port())},
        stdout=subprocess.DEVNULL,
        preexec_fn=die_with_parent,
    )
    try:
        yield
    finally:
        process.terminate()
        process.wait(30)


async def test_a_paused_worker_that_wakes_up_can_not_commit(
    suite: Suite, api: Rest, postgres_database: str, replica: str
) -> None:
    job_id = await started_run(api, postgres_database, replica)
    paused = suite.processes()["worker"]
    os.kill(paused, signal.SIGSTOP)
    try:
        with second_worker(suite):
            run = await await_end(api, job_id)
            assert run["status"] == "completed", run
            expected = await rows_of(postgres_database, SUMMARY)
            assert await rows_of(replica, SUMMARY) == expected
            ended = attempts_ended(suite)
            os.kill(paused, signal.SIGCONT)
            await eventually(lambda: attempts_ended(suite) > ended, "the paused worker ended its attempt")
            assert await rows_of(replica, SUMMARY) == expected
            assert (await newest_run(api, job_id))["status"] == "completed"
    finally:
        with suppress(ProcessLookupError):
            os.kill(paused, signal.SIGCONT)


def attempts_ended(suite: Suite) -> int:
    """How many attempts the suite's own worker has ended, by whatever outcome."""
    return sum(line["event"] in ("run_fenced", "run_ended") for line in suite.log_lines())


@asynccontextmanager
async def held_run(api: Rest, source_dsn: str, replica: str) -> AsyncIterator[int]:
    """The job of a run that reads until the block ends."""
    await execute(
        source_dsn,
        "CREATE VIEW held AS SELECT 1 AS id, pg_advisory_lock_shared(1)::text AS nothing;"
        " CREATE TABLE a AS SELECT 1 AS id",
    )
    source = await make_endpoint(api, "sources", "postgres", postgres_config(source_dsn))
    destination = await make_endpoint(api, "destinations", "postgres", postgres_config(replica))
    job_id = await make_job(api, source, destination)
    holder = await asyncpg.connect(source_dsn)
    try:
        await holder.execute("SELECT pg_advisory_lock(1)")
        await api.project("POST", f"jobs/{job_id}/sync", {})
        yield job_id
    finally:
        await holder.close()


async def starts_of(api: Rest, job_id: int) -> list[dict[str, Any]]:
    """The claims of the job's newest run."""
    run = await newest_run(api, job_id)
    history = await api.project("GET", f"jobs/{job_id}/tasks/{run['id']}/history")
    return [event for event in history if event["type"] == "run_started"]


async def claimed_times(api: Rest, job_id: int, times: int) -> None:
    """Wait for the newest run's claim of that number, and for the stream that it then reads."""
    async with asyncio.timeout(60):
        while len(await starts_of(api, job_id)) < times:
            await asyncio.sleep(0.1)
        while (await log_lines(api, job_id, await newest_run(api, job_id))).count(HELD_READ) < times:
            await asyncio.sleep(0.1)


async def test_stopping_the_worker_again_and_again_spends_no_attempt(
    embedded_suite: Suite, postgres_database: str, replica: str
) -> None:
    async with rest(embedded_suite.base_url, api_key=embedded_suite.api_key) as api:
        async with held_run(api, postgres_database, replica) as job_id:
            for times in range(1, 5):
                await claimed_times(api, job_id, times)
                os.kill(embedded_suite.processes()["worker"], signal.SIGTERM)
            await claimed_times(api, job_id, 5)
        run = await await_end(api, job_id)
        assert (run["status"], run["attempts"], run["error"]) == ("completed", 1, None)


async def test_a_restart_of_the_suite_spends_no_attempt(
    embedded_suite: Suite, postgres_database: str, replica: str
) -> None:
    async with rest(embedded_suite.base_url, api_key=embedded_suite.api_key) as api:
        async with held_run(api, postgres_database, replica) as job_id:
            await claimed_times(api, job_id, 1)
            await asyncio.to_thread(embedded_suite.stop)
            await asyncio.to_thread(embedded_suite.start)
            await claimed_times(api, job_id, 2)
        run = await await_end(api, job_id)
        assert (run["status"], run["attempts"], run["error"]) == ("completed", 1, None)


async def test_a_run_made_while_kafka_is_away_completes(kafka: str, postgres_database: str, replica: str) -> None:
    with suite_on("kafka") as (suite, broker):
        assert broker is not None
        assert broker.bootstrap_servers != kafka
        async with rest(suite.base_url, api_key=suite.api_key) as api:
            for hurt, table in ((signal.SIGSTOP, "a"), (signal.SIGKILL, "b")):
                os.kill(broker.pid, hurt)
                await execute(postgres_database, f"CREATE TABLE {table} AS SELECT 1 AS id")
                source = await make_endpoint(api, "sources", "postgres", postgres_config(postgres_database))
                destination = await make_endpoint(api, "destinations", "postgres", postgres_config(replica))
                run = await sync(api, await make_job(api, source, destination))
                assert (run["status"], run["attempts"]) == ("completed", 1), run
                assert await rows_of(replica, f"SELECT id FROM {table}") == [(1,)]
                await execute(postgres_database, f"DROP TABLE {table}")


async def test_a_revoked_key_is_refused_while_kafka_is_down(kafka: str) -> None:
    with suite_on("kafka") as (suite, broker):
        assert broker is not None
        assert broker.bootstrap_servers != kafka
        broker.kill()
        async with rest(suite.base_url, api_key=suite.api_key) as owner:
            issued = await owner.answer("POST", "/api/v2/keys", {"name": "short-lived"})
            assert issued.status in (200, 201), issued
            async with rest(suite.base_url, api_key=issued.body["secret"]) as holder:
                assert (await holder.answer("GET", "/api/v1/project/123/sources")).status == 200
                assert (await owner.answer("DELETE", f"/api/v2/keys/{issued.body['id']}")).status in (200, 204)
                async with asyncio.timeout(SETTLED_WITHIN_SECONDS):
                    while (await holder.answer("GET", "/api/v1/project/123/sources")).status != 401:
                        await asyncio.sleep(0.02)
