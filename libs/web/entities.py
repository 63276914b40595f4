"""What every kind of entity offers over HTTP: one, its past, its history, and commands under its conditions.

``Entities`` finds what a call may touch and hands commands over. ``EntityRoutes`` makes the usual routes of it; a
service says what its entities hold and which command each body is.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Annotated, Any, ClassVar, Generic, TypeVar

from pydantic import BaseModel, Field
from typing_extensions import TypedDict

from libs.core.decider import Aggregate
from libs.core.entity import Entity
from libs.core.envelope import Envelope, Frozen
from libs.core.errors import NotFound
from libs.core.ids import uuid7
from libs.core.text import number_of
from libs.eventsourcing.command_handler import CommandHandler
from libs.eventsourcing.documents import Documents
from libs.web import routes
from libs.web.answers import Answer, EventShown, event_view
from libs.web.calls import Call
from libs.web.inputs import NUMBER_MAX, HistoryQuery, Number, OneQuery, PageQuery
from libs.web.openapi import DescribedRoute, Shape

State = TypeVar("State", bound=Frozen)
Shown = TypeVar("Shown")
BodyT = TypeVar("BodyT", bound=BaseModel)

Permit = Callable[[Call, Entity[Any]], Awaitable[bool]]
"""Whether the call may see the entity: if not, it does not exist for the caller. May raise another refusal."""


def number(text: str) -> int | None:
    """An integer id."""
    found = number_of(text)
    return found if found is not None and found <= NUMBER_MAX else None


@dataclass(frozen=True, slots=True)
class IdKind:
    """How ids look in paths.

    Args:
        identify: the id that a text names, None where no entity can have it.
        pattern: of the path's parameter, as aiohttp writes it.
        shape: for the API's description.
    """

    identify: Callable[[str], int | str | None]
    pattern: str
    shape: Shape


NUMBERS = IdKind(number, r":\d+", Number)
TEXTS = IdKind(str, "", Annotated[str, Field(min_length=1)])


async def in_project(call: Call, entity: Entity[Any]) -> bool:
    """Entities belong to the project that the route names."""
    return entity.project_id == call.project_id


async def in_any_project(call: Call, entity: Entity[Any]) -> bool:
    """Entities belong to any of the caller's projects."""
    return entity.project_id in call.caller.projects


class Entities(Generic[State]):
    """The entities of one kind that a call may touch.

    Args:
        parameter: the name of the path's parameter that holds the id.
        ids: how ids look there.
        permit: which of them a call may see.
        not_found_code: the code of the refusal where there is none.
    """

    def __init__(
        self,
        aggregate: Aggregate[State],
        documents: Documents,
        commands: CommandHandler,
        *,
        parameter: str = "id",
        ids: IdKind = NUMBERS,
        permit: Permit = in_project,
        not_found_code: str = "not_found",
    ) -> None:
        self.aggregate = aggregate
        self.noun = aggregate.name.replace("_", " ")
        self.documents = documents
        self.commands = commands
        self.parameter = parameter
        self.ids = ids
        self._permit = permit
        self._not_found_code = not_found_code

    async def require(self, call: Call, *, deleted_too: bool = False) -> Entity[State]:
        """The entity that the path names; raises ``NotFound``."""
        return await self.named(call, call.path(self.parameter), deleted_too=deleted_too)

    async def named(self, call: Call, text: str, *, deleted_too: bool = False) -> Entity[State]:
        """The entity with the id in a text; raises ``NotFound``."""
        identifier = self.ids.identify(text)
        entity = None if identifier is None else await self.documents.get(self.aggregate, identifier)
        if entity is None or (is_deleted(entity) and not deleted_too) or not await self._permit(call, entity):
            raise NotFound(f"{self.noun} {text[:64]} does not exist", code=self._not_found_code)
        return entity

    async def at(self, call: Call, moment: datetime | None) -> Entity[State]:
        """The entity that the path names as it stands, or as it stood at a moment; raises ``NotFound``."""
        if moment is None:
            return await self.require(call)
        entity = await self.require(call, deleted_too=True)
        then = await self.documents.as_of(self.aggregate, entity.id, moment)
        if then is None or is_deleted(then):
            message = f"{self.noun} {entity.id} did not exist at that moment"
            raise NotFound(message, code=self._not_found_code)
        return replace(then, project_id=entity.project_id)

    async def events(self, call: Call, query: HistoryQuery) -> Sequence[Envelope]:
        """The events of the entity that the path names, which may be deleted, newest first."""
        entity = await self.require(call, deleted_too=True)
        return await self.documents.events_before(self.aggregate, entity.id, query.before, query.limit)

    async def page(self, call: Call, query: PageQuery) -> list[Entity[State]]:
        """Those of the call's project that are not deleted, newest first."""
        criteria: dict[str, Any] = {"project_id": call.project_id, "state.deleted": {"$ne": True}}
        if query.before is not None:
            criteria["_id"] = {"$lt": self.ids.identify(query.before)}
        return await self.documents.find(self.aggregate, criteria, limit=query.limit)

    async def change(self, call: Call, command: Any) -> Entity[State]:
        """Hand a command over to the entity that the path names; raises ``NotFound`` and what the command raises."""
        entity = await self.require(call)
        return await self.handle(call, entity.id, command)

    async def handle(self, call: Call, entity_id: int | str, command: Any) -> Entity[State]:
        """Hand a command over, under the call's conditions and its Idempotency-Key; a new id begins a stream."""
        handled = await self.commands.handle(
            self.aggregate,
            entity_id,
            command,
            call.metadata,
            expected_version=call.expected_version,
            idempotency=call.idempotency,
        )
        return replace(handled, project_id=call.metadata.project_id)


def is_deleted(entity: Entity[Any]) -> bool:
    """Whether the entity's state says that it was deleted."""
    return bool(getattr(entity.state, "deleted", False))


class EntityRoutes(Generic[State, Shown]):
    """The routes of one kind of entity.

    A service subclasses it, says ``path``, ``tag`` and ``shown`` (the ``TypedDict`` of one), and how one is viewed.
    ``reading()`` then gives the routes that list them and show one, its past and its history; ``creating``,
    ``changing`` and ``deleting`` give those of commands. What differs for a kind is overridden or routed beside them.

    Args:
        entities: those that a call may touch.
    """

    path: str
    tag: str
    shown: Any
    embeds_others: ClassVar[bool] = False

    def __init__(self, entities: Entities[State]) -> None:
        self.entities = entities
        self.noun = entities.noun
        self.one = f"{self.path}/{{{entities.parameter}{entities.ids.pattern}}}"

    async def view(self, call: Call, entity: Entity[State], as_of: datetime | None = None) -> Shown:
        """What the API shows of an entity; ``as_of`` is the moment at which it stood so, None for now."""
        raise NotImplementedError

    async def answer(self, call: Call, entity: Entity[State], message: str = "") -> Answer[Shown]:
        """An entity as a command left it."""
        return Answer(await self.view(call, entity), entity.version, message, self.embeds_others)

    async def page(self, call: Call, query: PageQuery) -> list[Shown]:
        """Those of the project, newest first."""
        found = await self.entities.page(call, query)
        return [await self.view(call, entity) for entity in found]

    async def get(self, call: Call, query: OneQuery) -> Answer[Shown]:
        """One as it stands; with ``as_of`` as it stood at that moment."""
        entity = await self.entities.at(call, query.as_of)
        shown = await self.view(call, entity, query.as_of)
        version = entity.version if query.as_of is None else None
        return Answer(shown, version, embeds_others=self.embeds_others)

    async def history(self, call: Call, query: HistoryQuery) -> list[EventShown]:
        """The events of one, newest first; those of a deleted one stay readable."""
        return [self.event_view(event) for event in await self.entities.events(call, query)]

    def event_view(self, envelope: Envelope) -> EventShown:
        """An event as histories show it."""
        return event_view(envelope)

    def reading(self) -> list[DescribedRoute]:
        """The routes that list them, and show one and its history."""
        listed = list[self.shown]  # type: ignore[name-defined]
        return [self.route("GET", self.path, self.page, f"List the {self.noun}s", answer=listed), *self.reading_one()]

    def reading_one(
        self, get: routes.CallHandler | None = None, history: routes.CallHandler | None = None
    ) -> list[DescribedRoute]:
        """The routes that show one and its history.

        Args:
            get, history: handlers in place of the usual ones, for what takes or shows more.
        """
        named = f"{'an' if self.noun[0] in 'aeiouAEIO' else 'a'} {self.noun}"
        return [
            self.route("GET", self.one, get or self.get, f"Fetch {named}", answer=self.shown, versioned=True),
            self.route("GET", f"{self.one}/history", history or self.history, f"The history of {named}"),
        ]

    def creating(
        self,
        body: type[BodyT],
        command: Callable[[BodyT], Any],
        new_id: Callable[[], Awaitable[int | str]] | None = None,
    ) -> DescribedRoute:
        """The route that creates one from a body; its id is a UUID unless ``new_id`` gives another."""

        async def create(call: Call, body: BodyT) -> Answer[Any]:
            created = await self.entities.handle(call, await new_id() if new_id else uuid7(), command(body))
            return await self.answer(call, created, f"{self.noun} created")

        return self.route(
            "POST",
            self.path,
            create,
            f"Create a {self.noun}",
            body=body,
            answer=self.shown,
            versioned=True,
            idempotent=True,
        )

    def changing(self, method: str, body: type[BodyT], command: Callable[[BodyT], Any]) -> DescribedRoute:
        """The route that changes one by a body: ``PUT`` or ``PATCH``."""

        async def change(call: Call, body: BodyT) -> Answer[Any]:
            return await self.answer(call, await self.entities.change(call, command(body)), f"{self.noun} changed")

        return self.route(
            method,
            self.one,
            change,
            f"Change a {self.noun}",
            body=body,
            answer=self.shown,
            versioned=True,
            conditional=True,
            refuses=(409,),
        )

    def deleting(self, command: Any) -> DescribedRoute:
        """The route that deletes one."""

        async def delete(call: Call) -> Answer[Deleted]:
            deleted = await self.entities.change(call, command)
            return Answer({"id": deleted.id}, message=f"{self.noun} deleted")

        return self.route("DELETE", self.one, delete, f"Delete a {self.noun}", conditional=True)

    def route(
        self, method: str, path: str, handler: routes.CallHandler, summary: str, **described: Any
    ) -> DescribedRoute:
        """A route of this kind, see ``libs.web.routes.route``."""
        if path.startswith(self.one):
            described["path_shapes"] = {self.entities.parameter: self.entities.ids.shape}
        return routes.route(method, path, handler, summary, tag=self.tag, **described)


class Deleted(TypedDict):
    id: int | str
