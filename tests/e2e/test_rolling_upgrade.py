"""Two versions of catalog and job_orchestrator side by side under load, and what is there when only the newer is left.

The newer one is a copy of this tree with one more event, one more field of an event and of a state, and one more field
in an internal call's request and in its answer. Each version's orchestrator calls the other version's catalog.
"""

import asyncio
import base64
import itertools
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from pydantic import SecretStr

from libs.core.json import JsonObject
from libs.core.principal import Principal
from libs.mongodb.client import connect
from libs.process.signing_keys import new_signing_key
from libs.suite.child_process import die_with_parent, free_port
from libs.testing.waiting import until
from libs.testing.walks import Walk
from libs.web.principals import PRINCIPAL_HEADER, PrincipalSigner

TREE = Path(__file__).resolve().parents[2]
ADA = Principal(kind="user", subject="u1", name="ada", projects={123: "owner"}, scopes=("*",))
CLIENTS = 6
PATCHES = {
    "libs/contracts/catalog.py": [
        ("    secret_ref: str | None = None\n", "    secret_ref: str | None = None\n    note: str = ''\n"),
        (
            "class SourceDeleted(CatalogEvent):\n",
            "class SourceTagged(CatalogEvent):\n    tag: str\n\n\nclass SourceDeleted(CatalogEvent):\n",
        ),
    ],
    "services/catalog/domain/connection.py": [
        ("    secret_ref: str | None = None\n", "    secret_ref: str | None = None\n    note: str = ''\n"),
        ("    deleted: bool = False\n", "    deleted: bool = False\n    tag: str = ''\n"),
        (
            "        return [types.created(**command.definition.model_dump())]\n",
            "        noted = {**command.definition.model_dump(), 'note': 'noted'}\n"
            "        tagged = [catalog.SourceTagged(tag='red')] if types.role == 'source' else []\n"
            "        return [types.created(**noted), *tagged]\n",
        ),
        (
            "    if isinstance(event, types.updated):\n",
            "    if isinstance(event, catalog.SourceTagged):\n"
            "        return state.model_copy(update={'tag': event.tag})\n"
            "    if isinstance(event, types.updated):\n",
        ),
        ("from libs.core.", "from libs.contracts import catalog\nfrom libs.core."),
    ],
    "services/job_orchestrator/projections.py": [
        (
            '                "deleted": False,\n',
            '                "deleted": False,\n                "note": event.note,\n',
        ),
        (
            "        case catalog.SourceDeleted()",
            "        case catalog.SourceTagged(tag=tag):\n            return {**(document or {}), 'tag': tag}\n"
            "        case catalog.SourceDeleted()",
        ),
        ("    catalog.SourceUpdated,\n", "    catalog.SourceUpdated,\n    catalog.SourceTagged,\n"),
    ],
    "libs/contracts/internal.py": [
        ("    destination: EndpointWanted\n", "    destination: EndpointWanted\n    urgency: int = 1\n"),
        ("    reserved_until: datetime\n", "    reserved_until: datetime\n    reserved_by: str = 'newer'\n"),
    ],
}


def newer_tree(directory: Path) -> Path:
    for name in ("libs", "services"):
        shutil.copytree(TREE / name, directory / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name, replacements in PATCHES.items():
        text = (directory / name).read_text()
        for before, after in replacements:
            assert before in text, (name, before)
            text = text.replace(before, after, 1)
        (directory / name).write_text(text)
    return directory


@dataclass
class Installation:
    """Two versions of two services on one MongoDB, each at an address of its own."""

    mongod: str
    prefix: str
    trees: dict[str, Path]
    keys: dict[str, tuple[str, str]] = field(
        default_factory=lambda: {name: new_signing_key() for name in ("gateway", "catalog", "job_orchestrator")}
    )
    ports: dict[tuple[str, str], int] = field(default_factory=dict)
    encryption_key: str = field(default_factory=lambda: base64.b64encode(os.urandom(32)).decode())

    def __post_init__(self) -> None:
        for place in itertools.product(("catalog", "job_orchestrator"), ("older", "newer")):
            self.ports[place] = free_port()

    def url(self, service: str, version: str) -> str:
        return f"http://127.0.0.1:{self.ports[service, version]}"

    @asynccontextmanager
    async def running(self, version: str) -> AsyncIterator[None]:
        """Both services of a version; they are stopped in good order."""
        async with AsyncExitStack() as stack:
            for service in ("catalog", "job_orchestrator"):
                await stack.enter_async_context(self._process(service, version))
            yield

    @asynccontextmanager
    async def _process(self, service: str, version: str) -> AsyncIterator[None]:
        other = "older" if version == "newer" else "newer"
        environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(self.trees[version]),
            "PYTHONDONTWRITEBYTECODE": "1",
            "MONGODB_URL": self.mongod,
            "DATABASE_PREFIX": self.prefix,
            "PORT": str(self.ports[service, version]),
            "SIGNING_KEY": self.keys[service][0],
            "TRUSTED_KEYS": json.dumps({name: public for name, (_, public) in self.keys.items()}),
            "CATALOG_URL": self.url("catalog", other),
            "JOB_ORCHESTRATOR_URL": self.url("job_orchestrator", version),
            "LOG_LEVEL": "WARNING",
        }
        if service == "catalog":
            environment["ENCRYPTION_KEYS"] = json.dumps({"k1": self.encryption_key})
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-m", f"services.{service}",
            env=environment, cwd=self.trees[version], preexec_fn=die_with_parent,
        )  # fmt: skip
        try:
            await until(lambda: self._is_up(service, version))
            yield
        finally:
            process.terminate()
            assert await process.wait() == 0

    async def _is_up(self, service: str, version: str) -> bool:
        """It listens once its store is open; whether it is ready depends on workers, of which there are none here."""
        try:
            async with (
                aiohttp.ClientSession() as session,
                session.get(f"{self.url(service, version)}/healthz") as response,
            ):
                return response.status == 200
        except aiohttp.ClientError:
            return False


class Load:
    """Clients that create jobs and rename their sources, each request at a random version, like a load balancer."""

    def __init__(self, place: Installation, walk: Walk) -> None:
        self._place = place
        self._walk = walk
        self._signer = PrincipalSigner("gateway", SecretStr(place.keys["gateway"][0]))
        self._numbers = itertools.count()
        self.jobs: dict[int, tuple[int, int]] = {}
        self.renamed: dict[int, str] = {}
        self.refused: Counter[str] = Counter()

    async def until_made(self, count: int) -> None:
        goal = len(self.jobs) + count
        async with aiohttp.ClientSession() as session, asyncio.TaskGroup() as group:
            for _ in range(CLIENTS):
                group.create_task(self._client(session, goal))

    async def _client(self, session: aiohttp.ClientSession, goal: int) -> None:
        while len(self.jobs) < goal:
            number = next(self._numbers)
            created = await self._call(session, "job_orchestrator", "POST", "/jobs", _job(f"job {number}", number))
            job_id = created["id"]
            job = await self._call(session, "job_orchestrator", "GET", f"/jobs/{job_id}")
            source_id = job["source"]["id"]
            self.jobs[job_id] = (source_id, job["destination"]["id"])
            name = f"renamed {number}"
            await self._call(session, "catalog", "PUT", f"/sources/{source_id}", {**_source(number), "name": name})
            self.renamed[source_id] = name

    async def _call(
        self, session: aiohttp.ClientSession, service: str, method: str, path: str, body: Any = None
    ) -> Any:
        for _ in range(100):
            version = self._walk.random.choice(("older", "newer"))
            url = f"{self._place.url(service, version)}/api/v1/project/123{path}"
            headers = {PRINCIPAL_HEADER: self._signer.sign(ADA, service)}
            async with session.request(method, url, json=body, headers=headers) as response:
                answer = await response.json()
                if response.status == 503:
                    self.refused[version] += 1
                    continue
                assert response.status < 300, (version, method, path, response.status, answer)
                return answer["data"]
        raise AssertionError(f"{method} {path}: refused by both versions")


def _source(number: int) -> JsonObject:
    config = {"host": "db", "port": 5432, "database": "shop", "username": "ada", "password": "secret"}
    return {"name": f"source {number}", "type": "postgres", "version": "v1.0.0", "config": config}


def _job(name: str, number: int) -> JsonObject:
    lake = {"type": "PARQUET", "writer": {"local_path": "/data/lake"}}
    return {
        "name": name,
        "source": _source(number),
        "destination": {"name": f"lake {number}", "type": "parquet", "version": "v1.0.0", "config": lake},
        "frequency": "",
        "streams_config": {
            "selected_streams": {"public": [{"stream_name": "flights"}]},
            "streams": [{"stream": {"name": "flights", "namespace": "public", "sync_mode": "full_refresh"}}],
        },
    }


@pytest.fixture
def place(mongod: str, database_prefix: str, tmp_path: Path) -> Installation:
    return Installation(mongod, database_prefix, {"older": TREE, "newer": newer_tree(tmp_path)})


async def test_two_versions_side_by_side_under_load_lose_nothing(place: Installation, walk: Walk) -> None:
    load = Load(place, walk)
    async with place.running("older"), place.running("newer"):
        # The older ones came first and hold every lease: they follow what the newer ones write.
        await load.until_made(walk.rounds(40, 800))
    async with place.running("newer"):
        async with place.running("older"):
            await load.until_made(walk.rounds(20, 400))
        assert load.refused["older"], "the older catalog must have met sources that only the newer can change"
        await everything_is_there(place, load)


async def everything_is_there(place: Installation, load: Load) -> None:
    client = connect(place.mongod)
    try:
        catalog, orchestrator = (client[f"{place.prefix}{name}"] for name in ("catalog", "job_orchestrator"))
        for database in (catalog, orchestrator):
            await until(lambda: _is_settled(database))  # noqa: B023 - awaited at once
            assert await database["parked"].count_documents({}) == 0
        sources, jobs = await _live(catalog, "sources"), await _live(orchestrator, "jobs")
        seen, seen_jobs = await _live(orchestrator, "sources"), await _live(catalog, "jobs")
        assert load.jobs.keys() <= jobs.keys() & seen_jobs.keys()
        events = [event async for event in catalog["events"].find({}).sort("position", 1)]
        kinds: dict[str, list[str]] = {}
        for event in events:
            kinds.setdefault(event["stream"], []).append(event["type"])
        tagged = {int(stream[7:]) for stream, types in kinds.items() if "source_tagged" in types}
        noted = {int(e["stream"][7:]) for e in events if e["type"] == "source_created" and "note" in e["data"]}
        assert noted == tagged
        assert 0 < len(tagged) < len(load.jobs), "both versions must have made some"
        for source_id, _ in load.jobs.values():
            types = kinds[f"source-{source_id}"]
            assert sources[source_id]["version"] == len(types)
            assert types.count("source_reference_confirmed") == 1, types
            assert sources[source_id]["state"].get("tag", "") == ("red" if source_id in tagged else "")
            assert sources[source_id]["state"]["definition"]["name"] == load.renamed[source_id]
            assert seen[source_id]["name"] == load.renamed[source_id]
            assert seen[source_id].get("tag") == ("red" if source_id in tagged else None)
    finally:
        client.close()


async def _is_settled(database: Any) -> bool:
    """Nothing waits for a newer version, and everything that was written is followed."""
    if await database["passed_over"].count_documents({}):
        return False
    topic, owner = ("jobs", "job_orchestrator") if database.name.endswith("catalog") else ("catalog", "catalog")
    prefix = database.name.removesuffix("catalog").removesuffix("job_orchestrator")
    events = database.client[prefix + owner]["events"]
    last = await events.find_one({"topic": f"datasync.{topic}.v1"}, sort=[("position", -1)])
    offset = await database["offsets"].find_one({"_id": f"datasync.{topic}.v1/0"})
    return last is not None and offset is not None and bool(offset["position"] >= last["position"])


async def _live(database: Any, name: str) -> dict[int, Any]:
    head = await database["head"].find_one({"_id": "head"})
    return {document["_id"]: document async for document in database[head["projections"][name]].find({})}
