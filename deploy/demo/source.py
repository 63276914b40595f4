"""A PostgreSQL with the demonstration's tables, to try DataSync with: ``python -m deploy.demo.source``."""

import asyncio
import json
import signal
import sys
from pathlib import Path
from urllib.parse import urlsplit

from deploy.demo import flights
from libs.testing.servers import Postgres

CACHE = Path(".cache")


def main() -> int:
    """Start it, print a source's configuration, and stay until Ctrl-C."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        data = flights.fetch(CACHE)
        with Postgres() as postgres:
            asyncio.run(flights.load(postgres.dsn, data))
            print(f"CONFIG='{json.dumps(configuration(postgres.dsn))}'", flush=True)
            signal.pause()
    except KeyboardInterrupt:
        return 0
    return 1


def configuration(dsn: str) -> dict[str, object]:
    """What a source of type ``postgres`` needs to connect."""
    address = urlsplit(dsn)
    return {
        "host": address.hostname,
        "port": address.port,
        "database": address.path.removeprefix("/"),
        "username": address.username,
        "password": address.password,
        "ssl": {"mode": "disable"},
    }


if __name__ == "__main__":
    sys.exit(main())
