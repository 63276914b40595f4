"""Bodies and queries about sources and destinations."""

from typing import Annotated, Any, Literal

from pydantic import Field

from libs.connectors import registry
from libs.core.json import JsonObject, parse_json
from libs.web.inputs import NUMBER_MAX, Body, Name, OneQuery, Query
from libs.web.requests import invalid_field
from services.catalog.connections import Given
from services.catalog.domain.connection import Role
from services.catalog.versions import VERSIONS, canonical_version

NO_JOB = -1
TYPE_LENGTH_MAX = 64

_CONFIG = {"host": "db.internal", "port": 5432, "database": "shop", "username": "reader", "password": "correct horse"}

Type = Annotated[str, Field(min_length=1, max_length=TYPE_LENGTH_MAX, examples=["postgres"])]
Config = Annotated[dict[str, Any] | str, Field(examples=[_CONFIG])]
OtherType = Annotated[str | None, Field(max_length=TYPE_LENGTH_MAX)]


class ConnectionBody(Body):
    """A source or destination; ``config`` is an object or a text that holds one."""

    name: Name = Field(examples=["shop"])
    type: Type
    version: str = Field(min_length=1, max_length=TYPE_LENGTH_MAX, examples=["v1.0.0"])
    config: Config

    def given(self, role: Role) -> Given:
        return Given(
            name=self.name,
            type=registry.canonical_type(role, self.type),
            version=canonical_version(self.version),
            config=config_object(self.config),
        )


class KindBody(Body):
    """Which connector; without a version the newest."""

    type: Type
    version: str = Field(default="", max_length=TYPE_LENGTH_MAX)

    @property
    def canonical_version(self) -> str:
        return canonical_version(self.version or VERSIONS[0])


class SpecBody(KindBody):
    catalog: OtherType = None
    source_type: OtherType = None
    source_version: OtherType = None


class TestBody(KindBody):
    config: Config
    source_type: OtherType = None
    source_version: OtherType = None


class StreamsBody(KindBody):
    config: Config
    job_id: int | None = Field(default=None, ge=NO_JOB, le=NUMBER_MAX)


class NameBody(Body):
    """Whether names of jobs are free is answered by the service that owns them."""

    name: Name = Field(examples=["shop"])
    entity_type: Literal["source", "destination", "job"]


class VersionsQuery(Query):
    type: str | None = Field(default=None, max_length=TYPE_LENGTH_MAX)


class ConnectionsQuery(Query):
    expand: Literal["config"] | None = None


class ConnectionQuery(OneQuery, ConnectionsQuery):
    pass


def config_object(config: Any) -> JsonObject:
    """A configuration that came as an object, or as a text that holds one."""
    if isinstance(config, str):
        config = parse_json(config.encode(), subject="config")
    if not isinstance(config, dict):
        raise invalid_field("config", "must be a JSON object, or a string that holds one")
    return config
