"""Developer sync records through the gateway against FastAPI with motor, and the thousandth page of a million.

Both sides write durably to the same mongod and are asked by the same client on 64 kept-alive connections, in
alternating rounds of which the median is taken. Ours passes a gateway that checks a key, and writes an event, the
record and eight counted lists in one transaction; the baseline inserts a document. All processes share the machine's
cores.

The million is written through the event store in batches of 5,000. Pages are then asked of the service itself, one at a
time, beside what ``count_documents`` and ``skip`` take for the same page on the same documents.
"""

import asyncio
import itertools
import json
import random
import shutil
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pymongo
from pydantic import SecretStr

from libs.contracts.records import RecordCreated
from libs.core.clock import SystemClock
from libs.core.envelope import Envelope, Metadata
from libs.core.ids import uuid7
from libs.core.principal import Principal
from libs.eventsourcing.batch import Batch
from libs.eventsourcing.entities import stored_document
from libs.eventsourcing.event_store import EventStore
from libs.eventsourcing.head import Head
from libs.eventsourcing.list_changes import ListChanges
from libs.mongodb.client import connect
from libs.process.live import Live
from libs.process.logs import configure_logs
from libs.process.signing_keys import new_signing_key
from libs.service.running import running_service
from libs.suite.child_process import die_with_parent, free_port
from libs.testing.servers import Mongod
from libs.testing.suite import Suite
from libs.web.principals import PRINCIPAL_HEADER, PrincipalSigner
from services.record_sync.app import SERVICE
from services.record_sync.config import RecordSyncSettings
from services.record_sync.domain.record import RECORD, lists, unique_keys
from services.record_sync.queries import INDEXES

RECORDS = "/api/v1/sync/records"
CONNECTIONS = 64
ROUNDS = 3
ROUND_SECONDS = 3.0
WARM_UP_SECONDS = 1.0
PRELOADED = 5_000
DEVELOPERS = 100

MILLION = 1_000_000
LOADED_TOGETHER = 5_000
ASKED = 200
PROJECT = 123
SETTINGS = {"LOG_LEVEL": "WARNING", "RATE_LIMIT_SYNC_PER_MINUTE": str(10**9)}
PACKAGES = ("fastapi==0.165.0", "uvicorn[standard]==0.54.0", "motor==3.7.1", "pymongo==4.20.0")
ENVIRONMENT = Path(__file__).resolve().parents[2] / ".cache" / "fastapi-0.165.0"

Result = dict[str, Any]


async def run() -> list[Result]:
    """Requests a second against the baseline, and milliseconds by page."""
    return await _rates() + await _pages()


# Through the gateway


@dataclass(frozen=True, slots=True)
class _Side:
    """Where requests go, with what credential, and some records that are there."""

    port: int
    credential: str
    ids: list[str]


async def _rates() -> list[Result]:
    python = await asyncio.to_thread(_environment)
    with Suite(environment=SETTINGS) as suite, _baseline(python, suite.mongodb_url) as port:
        sides = [_Side(suite.port, f"Authorization: Bearer {suite.api_key}\r\n", []), _Side(port, "", [])]
        for side in sides:
            await _preload(side)
        results = []
        for case, requests_of in (("created", _creations), ("fetched", _fetches), ("listed", _listings)):
            rates: list[list[float]] = [[], []]
            for number in range(ROUNDS + 1):
                for side, measured in zip(sides, rates, strict=True):
                    seconds = ROUND_SECONDS if number else WARM_UP_SECONDS
                    measured.append(await _rate(side, requests_of(side), seconds))
            ours, baseline = (statistics.median(measured[1:]) for measured in rates)
            results.append(
                {
                    "benchmark": "records",
                    "case": f"{case}, {CONNECTIONS} at a time",
                    "value": round(ours),
                    "unit": "requests/s",
                    "baseline": f"FastAPI and motor, no gateway: {baseline:.0f}/s",
                    "ratio": round(ours / baseline, 2),
                }
            )
        return results


def _creations(side: _Side) -> Callable[[], bytes]:
    del side
    numbers = itertools.count()
    prefix = uuid7()
    return lambda: _post(_body(f"{prefix}-{next(numbers)}"))


def _fetches(side: _Side) -> Callable[[], bytes]:
    return lambda: _get(f"{RECORDS}/{random.choice(side.ids)}")


def _listings(_: _Side) -> Callable[[], bytes]:
    return lambda: _get(f"{RECORDS}?developerId=dev-{random.randrange(DEVELOPERS)}&limit=50")


def _body(key: str) -> bytes:
    return json.dumps(
        {
            "developerId": f"dev-{random.randrange(DEVELOPERS)}",
            "resourceType": random.choice(("PROJECT_CONFIG", "FEATURE_FLAG_STATE", "EXTERNAL_API_KEY")),
            "resourceKey": key,
            "data": {"enabled": False, "lastToggle": "2025-12-01T11:00:00Z", "notes": "Initial state.", "weight": 1.5},
            "metadata": {"origin": "benchmark"},
        }
    ).encode()


def _get(target: str) -> bytes:
    return f"GET {target} HTTP/1.1\r\nHost: localhost\r\n%s\r\n".encode()


def _post(body: bytes) -> bytes:
    head = f"POST {RECORDS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n%s\r\n".encode() + body


async def _preload(side: _Side) -> None:
    numbers = iter(range(PRELOADED))

    async def create() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", side.port)
        for number in numbers:
            answer = await _answer(reader, writer, _post(_body(f"preloaded-{number}")), side)
            side.ids.append(json.loads(answer)["id"])
        writer.close()

    async with asyncio.TaskGroup() as group:
        for _ in range(CONNECTIONS):
            group.create_task(create())


async def _rate(side: _Side, request: Callable[[], bytes], seconds: float) -> float:
    begin = time.perf_counter()
    done = 0

    async def repeat() -> None:
        nonlocal done
        reader, writer = await asyncio.open_connection("127.0.0.1", side.port)
        while time.perf_counter() - begin < seconds:
            await _answer(reader, writer, request(), side)
            done += 1
        writer.close()

    async with asyncio.TaskGroup() as group:
        for _ in range(CONNECTIONS):
            group.create_task(repeat())
    return done / (time.perf_counter() - begin)


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes, side: _Side) -> bytes:
    writer.write(request.replace(b"%s", side.credential.encode(), 1))
    head = await reader.readuntil(b"\r\n\r\n")
    assert head[9:11] == b"20", head
    length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
    return await reader.readexactly(int(length))


@contextmanager
def _baseline(python: Path, mongodb_url: str) -> Iterator[int]:
    """The baseline's port, while it runs."""
    port = free_port()
    script = Path(__file__).with_name("fastapi_baseline.py")
    process = subprocess.Popen(
        [str(python), "-P", str(script), mongodb_url, "bench_baseline", str(port)], preexec_fn=die_with_parent
    )
    try:
        deadline = time.monotonic() + 30
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}{RECORDS}", timeout=2).close()
                break
            except (urllib.error.URLError, OSError):
                assert process.poll() is None, "the baseline does not start"
                assert time.monotonic() < deadline, "the baseline does not answer"
                time.sleep(0.05)
        yield port
    finally:
        process.terminate()
        process.wait(10)


def _environment() -> Path:
    """The Python of an environment that holds FastAPI, made the first time."""
    python = ENVIRONMENT / "bin" / "python"
    if not (ENVIRONMENT / "complete").exists():
        shutil.rmtree(ENVIRONMENT, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(ENVIRONMENT)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
        (ENVIRONMENT / "complete").touch()
    return python


# A million


async def _pages() -> list[Result]:
    with Mongod() as mongod:
        database = "bench_record_sync"
        started = time.perf_counter()
        await _load(mongod.url, database)
        with pymongo.MongoClient[dict[str, Any]](mongod.url) as client:
            # A service's own connections would not wait so long for indexes over what is there already.
            await asyncio.to_thread(client[database]["records"].create_indexes, list(INDEXES["records"]))
            loaded_seconds = time.perf_counter() - started
            skipping = await asyncio.to_thread(_skipping, client[database]["records"], 1000)
        ours = await _asked(mongod.url, [1, 1000, MILLION // 50])
    common = {"benchmark": "records", "unit": "ms"}
    loaded = f"{MILLION:,} records, loaded in {loaded_seconds:.0f} s"
    return [
        common
        | {
            "case": "page 1,000",
            "value": round(ours[1000], 2),
            "baseline": f"page 1: {ours[1]:.2f} ms ({loaded})",
            "ratio": round(ours[1] / ours[1000], 2),
        },
        common
        | {
            "case": f"page {MILLION // 50:,}",
            "value": round(ours[MILLION // 50], 2),
            "baseline": f"page 1: {ours[1]:.2f} ms",
            "ratio": round(ours[1] / ours[MILLION // 50], 2),
        },
        common
        | {
            "case": "page 1,000 and total",
            "value": round(ours[1000], 2),
            "baseline": f"count_documents and skip, without HTTP: {skipping:.1f} ms",
            "ratio": round(skipping / ours[1000], 1),
        },
    ]


async def _load(url: str, database: str) -> None:
    client = connect(url)
    store = EventStore(client, database)
    await store.open(SERVICE.collections, {})
    head = await store.head()
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(1) as writer:
        writing = None
        for first in range(0, MILLION, LOADED_TOGETHER):
            batch = _batch(head, range(first, first + LOADED_TOGETHER))
            if writing is not None:
                await writing
            writing = loop.run_in_executor(writer, store.writer.commit, batch)
        assert writing is not None
        await writing
    client.close()


def _batch(head: Head, numbers: range) -> Batch:
    """What the write path would commit for these creations."""
    batch, changes, now = Batch(head.collections), ListChanges(), SystemClock().now()
    metadata = Metadata(actor="bench", project_id=PROJECT)
    documents = []
    for number in numbers:
        identifier = uuid7()
        event = RecordCreated(
            developer_id=f"dev-{number * DEVELOPERS // MILLION}",
            resource_type=("PROJECT_CONFIG", "FEATURE_FLAG_STATE", "EXTERNAL_API_KEY")[number % 3],
            resource_key=str(number),
            data_json='{"enabled":false,"lastToggle":"2025-12-01T11:00:00Z","notes":"Initial state."}',
            status="ERROR" if number % 50 == 0 else "ACTIVE",
            metadata_json="{}",
        )
        data_json = event.model_dump_json().encode()
        stream = RECORD.stream(identifier)
        envelope = Envelope(uuid7(), stream, 1, 0, head.store_id, now, event, data_json, metadata)
        state = RECORD.evolve(None, envelope)
        place = changes.move((), lists(state), None)
        assert place is not None
        document = stored_document(identifier, 1, PROJECT, unique_keys(state), state, place)
        changes.documents.append((document, place))
        documents.append(document)
        batch.events.append(envelope)
    batch.inserts["records"] = documents
    batch.lists["record_lists"] = changes
    return batch


def _skipping(records: Any, page: int) -> float:
    """Milliseconds of the usual way, on the same documents and an index in its order."""
    criteria = {"project_id": PROJECT, "number": {"$gte": 0}}
    order = [("project_id", 1), ("number", 1)]
    took = []
    for _ in range(5):
        begin = time.perf_counter()
        total = records.count_documents(criteria, hint=order)
        found = list(records.find(criteria).hint(order).sort("number", -1).skip((page - 1) * 50).limit(50))
        took.append((time.perf_counter() - begin) * 1000)
        assert (total, len(found)) == (MILLION, 50)
    return statistics.median(took)


async def _asked(url: str, pages: list[int]) -> dict[int, float]:
    """Median milliseconds of each page, asked one at a time in turn."""
    gateway_key, gateway_public = new_signing_key()
    own_key, _ = new_signing_key()
    settings = RecordSyncSettings(
        mongodb_url=url,
        database_prefix="bench_",
        port=0,
        signing_key=SecretStr(own_key),
        trusted_keys={"gateway": gateway_public},
        log_level=Live("WARN"),
    )
    configure_logs("record_sync", settings)
    caller = Principal(kind="api_key", subject="bench", name="bench", projects={PROJECT: "owner"}, scopes=("*",))
    token = PrincipalSigner("gateway", SecretStr(gateway_key)).sign(caller, "record_sync", ttl_seconds=3600)
    took: dict[int, list[float]] = {page: [] for page in pages}
    async with (
        running_service(SERVICE, settings) as service,
        aiohttp.ClientSession(headers={PRINCIPAL_HEADER: token}, base_url=service.base_url) as session,
    ):
        for _ in range(ASKED):
            for page, measured in took.items():
                begin = time.perf_counter()
                async with session.get(RECORDS, params={"page": page, "limit": 50}) as response:
                    body = await response.json()
                measured.append((time.perf_counter() - begin) * 1000)
                first = MILLION - 1 - (page - 1) * 50
                assert body["total"] == MILLION
                assert [item["resourceKey"] for item in body["data"]] == [str(first - step) for step in range(50)]
    return {page: statistics.median(measured[10:]) for page, measured in took.items()}
