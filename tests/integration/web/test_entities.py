"""The routes that a kind of entity gets by saying only what is its own: this is all that a new one needs over HTTP."""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import aiohttp
import orjson
import pytest
from aiohttp import web
from pydantic import SecretStr
from typing_extensions import TypedDict

from libs.core.entity import Entity
from libs.core.principal import Principal
from libs.process.settings import ServiceSettings
from libs.process.signing_keys import new_signing_key
from libs.service.definition import ServiceContext, ServiceDefinition
from libs.service.running import running_service
from libs.testing.things import THING, DiscardThing, MakeThing, RenameThing, Thing
from libs.web.answers import Moment
from libs.web.calls import Call
from libs.web.entities import TEXTS, Entities, EntityRoutes
from libs.web.inputs import Body, Name
from libs.web.principals import PRINCIPAL_HEADER, PrincipalSigner

KEY, PUBLIC_KEY = new_signing_key()
ANN = Principal(kind="user", subject="1", name="ann", projects={123: "owner", 124: "owner"}, scopes=("*",))


class ThingBody(Body):
    name: Name


class ThingShown(TypedDict):
    id: str
    name: str
    created_at: Moment


class ThingRoutes(EntityRoutes[Thing, ThingShown]):
    path = "/api/v1/project/{projectid}/things"
    tag = "Things"
    shown = ThingShown

    def routes(self) -> Sequence[web.RouteDef]:
        return [
            *self.reading(),
            self.creating(ThingBody, lambda body: MakeThing(body.name)),
            self.changing("PUT", ThingBody, lambda body: RenameThing(body.name)),
            self.deleting(DiscardThing()),
        ]

    async def view(self, call: Call, entity: Entity[Thing], as_of: datetime | None = None) -> ThingShown:
        return {"id": str(entity.id), "name": entity.state.name, "created_at": entity.state.created_at}


@asynccontextmanager
async def start(context: ServiceContext[ServiceSettings]) -> AsyncIterator[Sequence[web.AbstractRouteDef]]:
    yield ThingRoutes(Entities(THING, context.documents, context.commands, ids=TEXTS)).routes()


SERVICE = ServiceDefinition(name="things", settings=ServiceSettings, start=start, aggregates=(THING,))


@dataclass
class Answer:
    status: int
    body: Any
    headers: Mapping[str, str]

    @property
    def data(self) -> Any:
        assert self.status == 200, self.body
        return self.body["data"]


@dataclass
class Things:
    """The running service, called as the gateway calls it."""

    session: aiohttp.ClientSession

    async def call(
        self, method: str, path: str = "", body: Any = None, *, project: int = 123, **headers: str
    ) -> Answer:
        sent = {PRINCIPAL_HEADER: PrincipalSigner("gateway", SecretStr(KEY)).sign(ANN, "things")}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        url = f"/api/v1/project/{project}/things{path}"
        async with self.session.request(method, url, json=body, headers=sent) as response:
            return Answer(response.status, orjson.loads(await response.read()), response.headers.copy())


@pytest.fixture
async def things(mongod: str, database_prefix: str) -> AsyncIterator[Things]:
    settings = ServiceSettings(
        port=0, mongodb_url=mongod, database_prefix=database_prefix, trusted_keys={"gateway": PUBLIC_KEY}
    )
    async with (
        running_service(SERVICE, settings) as service,
        aiohttp.ClientSession(service.base_url) as session,
    ):
        yield Things(session)


async def test_what_was_created_is_shown_listed_changed_and_deleted(things: Things) -> None:
    created = await things.call("POST", body={"name": " cup "})
    assert (created.data["name"], created.body["message"], created.headers["ETag"]) == ("cup", "thing created", '"1"')
    one = f"/{created.data['id']}"
    assert (await things.call("GET", one)).data == created.data
    changed = await things.call("PUT", one, {"name": "mug"}, If_Match='"1"')
    assert (changed.data["name"], changed.headers["ETag"]) == ("mug", '"2"')
    assert [item["name"] for item in (await things.call("GET")).data] == ["mug"]
    assert (await things.call("DELETE", one)).data == {"id": created.data["id"]}
    assert (await things.call("GET")).data == []
    assert (await things.call("GET", one)).status == 404
    history = (await things.call("GET", f"{one}/history")).data
    assert [event["type"] for event in history] == ["thing_discarded", "thing_renamed", "thing_made"]


async def test_an_entity_is_shown_as_it_stood(things: Things) -> None:
    created = (await things.call("POST", body={"name": "cup"})).data
    one = f"/{created['id']}"
    await things.call("PUT", one, {"name": "mug"})
    then = await things.call("GET", f"{one}?as_of={created['created_at']}")
    assert (then.data, "ETag" in then.headers) == (created, False)
    assert (await things.call("GET", f"{one}?as_of=2020-01-01T00:00:00Z")).status == 404


async def test_a_change_that_is_based_on_an_old_version_is_refused(things: Things) -> None:
    one = f"/{(await things.call('POST', body={'name': 'cup'})).data['id']}"
    await things.call("PUT", one, {"name": "mug"})
    stale = await things.call("PUT", one, {"name": "bowl"}, If_Match='"1"')
    assert (stale.status, stale.body["code"]) == (412, "precondition_failed")
    assert (await things.call("GET", one)).data["name"] == "mug"


async def test_a_repeated_creation_creates_nothing(things: Things) -> None:
    first = await things.call("POST", body={"name": "cup"}, Idempotency_Key="k")
    again = await things.call("POST", body={"name": "cup"}, Idempotency_Key="k")
    assert again.data == first.data
    assert len((await things.call("GET")).data) == 1
    other = await things.call("POST", body={"name": "mug"}, Idempotency_Key="k")
    assert (other.status, other.body["code"]) == (422, "idempotency_key_reused")


async def test_another_projects_entities_do_not_exist(things: Things) -> None:
    one = f"/{(await things.call('POST', body={'name': 'cup'})).data['id']}"
    assert (await things.call("GET", project=124)).data == []
    for method, path, body in (("GET", one, None), ("GET", f"{one}/history", None), ("PUT", one, {"name": "x"})):
        assert (await things.call(method, path, body, project=124)).status == 404
    assert (await things.call("DELETE", one, project=124)).status == 404
    assert (await things.call("GET", one)).data["name"] == "cup"


async def test_pages_follow_each_other(things: Things) -> None:
    for number in range(5):
        await things.call("POST", body={"name": f"cup {number}"})
    first = (await things.call("GET", "?limit=2")).data
    second = (await things.call("GET", f"?limit=2&before={first[-1]['id']}")).data
    assert [item["name"] for item in (*first, *second)] == ["cup 4", "cup 3", "cup 2", "cup 1"]


async def test_a_body_is_refused_by_its_fields(things: Things) -> None:
    refused = await things.call("POST", body={"name": ""})
    assert (refused.status, [error["field"] for error in refused.body["errors"]]) == (400, ["name"])
