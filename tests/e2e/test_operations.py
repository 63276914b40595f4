"""What an operator does from outside, while the suite runs."""

import asyncio
import base64
import json
import secrets
from typing import Any

from libs.testing.rest import Rest, rest
from libs.testing.suite import Suite
from tests.e2e.replication import make_endpoint, unique
from tests.e2e.stores import database

CONFIG: dict[str, Any] = {"host": "127.0.0.1", "port": 5432, "database": "d", "username": "u"}


async def test_documents_are_what_a_rebuild_makes_of_the_events_and_nothing_is_parked(suite: Suite, api: Rest) -> None:
    await make_endpoint(api, "sources", "postgres", {**CONFIG, "password": "p"})
    for service in ("auth", "catalog", "job_orchestrator", "record_sync"):
        compared = await asyncio.to_thread(suite.command, "rebuild", service, "--compare")
        assert compared.returncode == 0, compared.stdout + compared.stderr
        assert "compared at position" in compared.stdout
    parked = await asyncio.to_thread(suite.command, "parked", "job_orchestrator")
    assert (parked.returncode, parked.stdout) == (0, ""), parked


async def test_a_rebuild_takes_the_place_of_the_documents_while_the_service_runs(suite: Suite, api: Rest) -> None:
    await make_endpoint(api, "sources", "postgres", {**CONFIG, "password": "p"})
    before = await api.project("GET", "sources")
    rebuilt = await asyncio.to_thread(suite.command, "rebuild", "catalog")
    assert rebuilt.returncode == 0, rebuilt.stdout + rebuilt.stderr
    assert "swapped at position" in rebuilt.stdout
    assert await api.project("GET", "sources") == before
    await make_endpoint(api, "sources", "postgres", {**CONFIG, "password": "p"})


async def test_secrets_are_wrapped_anew_by_the_first_key(embedded_suite: Suite) -> None:
    suite, keys_path = embedded_suite, embedded_suite.directory / "keys" / "encryption.json"
    old = json.loads(keys_path.read_text())
    new = {unique("key"): base64.b64encode(secrets.token_bytes(32)).decode()}
    async with rest(suite.base_url, api_key=suite.api_key) as api:
        await make_endpoint(api, "sources", "postgres", {**CONFIG, "password": unique("secret")})
    # The running catalog knows the old keys only, so they come first again in the end.
    for keys, current in (({**new, **old}, new), ({**old, **new}, old)):
        keys_path.write_text(json.dumps(keys))
        done = await asyncio.to_thread(suite.command, "keys", "rewrap")
        assert done.returncode == 0, done.stderr
        assert int(done.stdout.split()[0]) >= 1
        with database(suite, "catalog") as stored:
            assert stored["secrets"].distinct("key_id") == list(current)
    keys_path.write_text(json.dumps(old))


async def test_an_unknown_service_is_refused(embedded_suite: Suite) -> None:
    for arguments in (("serve", "nothing"), ("rebuild", "gateway")):
        refused = await asyncio.to_thread(embedded_suite.command, *arguments)
        assert refused.returncode == 1
        assert arguments[1] in refused.stderr


async def test_a_command_that_is_told_of_another_log_than_the_service_uses_does_nothing(
    suite: Suite, api: Rest
) -> None:
    """Neither by its shell, nor where nothing is kept but in the store."""
    uses_kafka = "kafka_bootstrap_servers" in suite.settings
    wrong = {} if uses_kafka else {"KAFKA_BOOTSTRAP_SERVERS": "127.0.0.1:1"}
    if not uses_kafka:
        refused = await asyncio.to_thread(suite.command, "repair", "job_orchestrator", "datasync.catalog.v1", **wrong)
        assert refused.returncode == 2
        assert "KAFKA_BOOTSTRAP_SERVERS" in refused.stderr
        return
    elsewhere = {"KAFKA_BOOTSTRAP_SERVERS": "", "MONGODB_URL": suite.mongodb_url, "DATA_DIR": "/nonexistent"}
    for arguments in (("repair", "job_orchestrator", "datasync.catalog.v1"), ("rebuild", "catalog", "--compare")):
        refused = await asyncio.to_thread(suite.command, *arguments, **elsewhere)
        assert refused.returncode == 1
        assert "are on the Kafka cluster" in refused.stderr
        assert "nothing was done" in refused.stderr


async def test_commands_take_the_installation_s_settings_from_its_data_directory(suite: Suite, api: Rest) -> None:
    unset = {name.upper(): "" for name in suite.settings}
    compared = await asyncio.to_thread(suite.command, "rebuild", "catalog", "--compare", **unset)
    assert compared.returncode == 0, compared.stdout + compared.stderr


async def test_the_line_of_a_request_names_who_called_and_from_where(suite: Suite, api: Rest) -> None:
    path = f"/api/v1/project/123/sources/{secrets.randbelow(10**9) + 10**6}"
    await api.answer("GET", path)
    async with rest(suite.base_url) as nobody:
        await nobody.answer("GET", path)
    async with asyncio.timeout(10):
        while len(lines := [line for line in suite.log_lines() if line.get("path") == path]) < 2:
            await asyncio.sleep(0.05)
    known, unknown = (line for line in lines if line["event"] == "http_request")
    assert known["principal"].startswith("api_key/")
    assert suite.api_key not in str(known)
    assert unknown["principal"] is None
    assert {line["client_address"] for line in (known, unknown)} == {"127.0.0.1"}
