"""Databases of a test's own on a PostgreSQL server that tests share."""

import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import asyncpg

from libs.testing.servers import Postgres


def postgres_config(dsn: str) -> dict[str, Any]:
    """The configuration of a source or destination of type ``postgres`` that connects to a DSN."""
    address = urlsplit(dsn)
    return {
        "host": address.hostname,
        "port": address.port,
        "database": address.path.removeprefix("/"),
        "username": address.username,
        "password": address.password,
        "ssl": {"mode": "disable"},
    }


@asynccontextmanager
async def new_database(server: Postgres, options: str = "") -> AsyncIterator[str]:
    """The superuser's DSN of an empty database, which is dropped at the end.

    Args:
        options: of ``CREATE DATABASE``.
    """
    name = f"test_{uuid.uuid4().hex[:10]}"
    administrator = await asyncpg.connect(server.dsn)
    try:
        await administrator.execute(f"CREATE DATABASE {name} {options}")
        yield server.dsn_of(name)
        await administrator.execute(f"DROP DATABASE {name} WITH (FORCE)")
    finally:
        await administrator.close()
