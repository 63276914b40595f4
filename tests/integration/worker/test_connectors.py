"""Tests of connections and discoveries, as catalog asks for them."""

import json
import socket

import pytest

from libs.connectors.protocol import ConnectorRefused
from libs.contracts.internal import ConnectorConfig
from libs.core.clock import SystemClock
from libs.core.errors import InvalidInput, UpstreamTimeout
from services.worker.config import WorkerSettings
from services.worker.http import ConnectorHttp
from tests.integration.connectors.moving import Lake, Server

HTTP = ConnectorHttp(WorkerSettings(worker_check_seconds=0.5, worker_discover_seconds=0.5), SystemClock())


async def test_a_working_connection_passes(source: Server, lake: Lake) -> None:
    for wanted in (
        ConnectorConfig(role="source", type="postgresql", config=source.config),
        ConnectorConfig(role="destination", type="postgres", config=source.config),
        ConnectorConfig(role="destination", type="parquet", config={"local_path": str(lake.path)}),
    ):
        result = await HTTP.check(wanted)
        assert (result.succeeded, result.message) == (True, "Connection succeeded")
        assert [line.level for line in result.log_lines] == ["info", "info"]


async def test_a_path_outside_the_parquet_roots_is_refused(lake: Lake) -> None:
    lake.path.mkdir()
    inside, outside = lake.path / "in", lake.path / "out"
    inside.mkdir()
    outside.mkdir()
    (inside / "link").symlink_to(outside)
    settings = WorkerSettings.model_validate({"parquet_roots": f"{inside}, /nowhere"})
    assert settings.parquet_roots == (str(inside), "/nowhere")
    assert WorkerSettings.model_validate({"parquet_roots": f'["{inside}"]'}).parquet_roots == (str(inside),)
    http = ConnectorHttp(settings, SystemClock())
    for path, allowed in (
        (inside, True),
        (inside / "new", True),
        (outside, False),
        (inside / "link", False),
        (lake.path / "inn", False),
    ):
        wanted = ConnectorConfig(role="destination", type="parquet", config={"local_path": str(path)})
        result = await http.check(wanted)
        assert result.succeeded is allowed, path
        assert allowed or f"local_path {path} is not below" in result.message
    assert list(outside.iterdir()) == []


async def test_a_failing_one_is_an_answer_with_the_reason(source: Server) -> None:
    for config, words in (
        (source.config | {"password": "wrong"}, "refused the credentials"),
        (source.config | {"port": "many"}, "config.port"),
        (source.config | {"ssh_config": {"host": "x"}}, "SSH tunnel is not supported"),
    ):
        result = await HTTP.check(ConnectorConfig(role="source", type="postgres", config=config))
        assert result.succeeded is False
        assert words in result.message
        assert result.log_lines[-1].level == "error"


async def test_a_schema_that_is_not_there_is_refused_alike_by_the_test_and_the_discovery(source: Server) -> None:
    wanted = ConnectorConfig(role="source", type="postgres", config=source.config | {"schemas": ["public", "nope"]})
    words = "schemas: the database has no schema 'nope'"
    assert (await HTTP.check(wanted)).message == words
    with pytest.raises(ConnectorRefused, match=words):
        await HTTP.discover(wanted)


async def test_a_role_that_may_write_to_no_schema_fails_the_test_and_one_that_may_to_some_is_told_which_not(
    destination: Server,
) -> None:
    database = destination.config["database"]
    async with destination.limited_role() as role:
        name = role["username"]
        await destination.execute(
            "REVOKE CREATE ON SCHEMA public FROM PUBLIC; CREATE SCHEMA _datasync; CREATE SCHEMA s"
        )
        await destination.execute(f"GRANT USAGE, CREATE ON SCHEMA _datasync TO {name}")
        wanted = ConnectorConfig(role="destination", type="postgres", config=destination.config | role)
        refused = await HTTP.check(wanted)
        assert (refused.succeeded, "grant it CREATE" in refused.message) == (False, True)
        await destination.execute(f"GRANT CREATE ON DATABASE {database} TO {name}")
        warned = await HTTP.check(wanted)
        assert warned.succeeded is True
        assert warned.message.startswith("Connection succeeded, but the role may not create tables")
        assert warned.message.endswith(": public, s")
        assert [line.level for line in warned.log_lines] == ["info", "warning", "info"]
        await destination.execute(f"GRANT CREATE ON SCHEMA s, public TO {name}")
        assert (await HTTP.check(wanted)).message == "Connection succeeded"


async def test_a_test_leaves_no_directory_that_it_made_and_each_that_was_there(lake: Lake) -> None:
    lake.path.mkdir()
    config = {"local_path": str(lake.path / "new" / "deep")}
    assert (await HTTP.check(ConnectorConfig(role="destination", type="parquet", config=config))).succeeded
    assert list(lake.path.iterdir()) == []
    config = {"local_path": str(lake.path)}
    assert (await HTTP.check(ConnectorConfig(role="destination", type="parquet", config=config))).succeeded
    assert lake.path.is_dir()


async def test_a_host_that_hangs_is_given_up_in_time(source: Server) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        config = source.config | {"port": silent.getsockname()[1]}
        wanted = ConnectorConfig(role="source", type="postgres", config=config)
        assert "did not answer within 0.5 s" in (await HTTP.check(wanted)).message
        with pytest.raises(UpstreamTimeout, match=r"within 0\.5 s"):
            await HTTP.discover(wanted)


async def test_discovery_answers_the_catalog(source: Server) -> None:
    await source.execute("CREATE TABLE t (id int PRIMARY KEY)")
    found = await HTTP.discover(ConnectorConfig(role="source", type="postgres", config=source.config))
    assert [entry["stream"]["name"] for entry in json.loads(found.streams_json)] == ["t"]


async def test_an_unknown_type_is_refused() -> None:
    with pytest.raises(InvalidInput, match="sources of the type"):
        await HTTP.discover(ConnectorConfig(role="source", type="oracle", config={}))
