"""The servers that all other tests stand on can be used, broken and mended."""

import asyncio
from typing import Any

import asyncpg
import pymongo
import pytest

from libs.suite.child_process import accepts_connections
from libs.testing.servers import Kafka, Mongod, Postgres


def _client(url: str) -> "pymongo.MongoClient[dict[str, Any]]":
    return pymongo.MongoClient(url, w="majority", journal=True, serverSelectionTimeoutMS=10_000)


def test_mongod_has_transactions_and_keeps_acknowledged_writes_over_kill_9() -> None:
    with Mongod() as server:
        with _client(server.url) as client, client.start_session() as session, session.start_transaction():
            client["test"]["things"].insert_one({"_id": 1}, session=session)
        server.kill()
        server.start()
        with _client(server.url) as client:
            assert client["test"]["things"].find_one() == {"_id": 1}


def test_mongod_that_is_paused_answers_again_when_it_is_resumed() -> None:
    with Mongod() as server:
        server.pause()
        with pymongo.MongoClient[dict[str, Any]](server.url, serverSelectionTimeoutMS=300) as client:
            with pytest.raises(pymongo.errors.ServerSelectionTimeoutError):
                client.admin.command("ping")
            server.resume()
        with _client(server.url) as client:
            assert client.admin.command("ping")["ok"] == 1


async def test_postgres_takes_the_right_password_only_and_survives_kill_9(postgres_database: str) -> None:
    with Postgres() as server:
        with pytest.raises(asyncpg.InvalidPasswordError):
            await asyncpg.connect(server.dsn.replace(server.password, "wrong"))
        connection = await asyncpg.connect(server.dsn)
        await connection.execute("CREATE TABLE things AS SELECT 1 AS id")
        await asyncio.to_thread(server.kill)
        await asyncio.to_thread(server.start)
        connection = await asyncpg.connect(server.dsn)
        assert await connection.fetchval("SELECT id FROM things") == 1
        await connection.close()


@pytest.mark.kafka
def test_kafka_starts_again_on_its_port_after_kill_9(kafka: str) -> None:
    with Kafka() as server:
        server.kill()
        assert not accepts_connections("127.0.0.1", server.port)
        server.start()
        assert server.bootstrap_servers != kafka
