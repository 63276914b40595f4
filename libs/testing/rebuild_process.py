"""A rebuild as a process of its own, for a test that kills it in the middle of its swap, where it stays.

``python -m libs.testing.rebuild_process MONGODB_URL DATABASE_PREFIX``. It writes a line once it holds the head.
"""

import asyncio
import sys
import threading

from libs.eventsourcing.head import Head
from libs.eventsourcing.rebuild import Rebuild
from libs.mongodb.client import ClientSession
from libs.testing.followers import installation
from libs.testing.things import THING


class Staying(Rebuild):
    def _last_step(self, session: ClientSession, before: Head) -> None:
        super()._last_step(session, before)
        print("holding", flush=True)  # noqa: T201 - the test reads it
        threading.Event().wait()


async def main(mongodb_url: str, database_prefix: str) -> None:
    async with installation(mongodb_url, database_prefix, None) as place, place.owner() as owner:
        await Staying(owner.store, place.open_log("rebuild"), aggregates=[THING]).run(grace_seconds=0)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
