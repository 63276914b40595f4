"""A PostgreSQL with the demonstration's tables, to try DataSync with: ``python -m deploy.demo.source``."""

import asyncio
import json
import signal
import sys
from pathlib import Path

from deploy.demo import flights
from libs.testing.databases import postgres_config
from libs.testing.servers import Postgres

CACHE = Path(".cache")


def main() -> int:
    """Start it, print a source's configuration, and stay until Ctrl-C."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        data = flights.fetch(CACHE)
        with Postgres() as postgres:
            asyncio.run(flights.load(postgres.dsn, data))
            print(f"CONFIG='{json.dumps(postgres_config(postgres.dsn))}'", flush=True)
            signal.pause()
    except KeyboardInterrupt:
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
