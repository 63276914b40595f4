"""A cluster that requires TLS and a password: everything that the log does works over that listener."""

import uuid
from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError

from libs.contracts.catalog import TOPIC
from libs.event_log import open_event_log
from libs.mongodb.client import connect
from libs.process.settings import StoreSettings
from libs.testing.certificates import Authority
from libs.testing.servers import Kafka
from tests.contract.test_event_log import SOURCE, envelope_of, read


def settings_for(server: Kafka, **changes: object) -> StoreSettings:
    chosen = {
        "kafka_bootstrap_servers": server.secure_bootstrap_servers,
        "kafka_topic_prefix": f"{uuid.uuid4().hex[:8]}.",
        "kafka_security_protocol": "SASL_SSL",
        "kafka_ssl_ca_file": server.ca_file,
        "kafka_sasl_mechanism": "PLAIN",
        "kafka_sasl_username": "datasync",
        "kafka_sasl_password": SecretStr(server.password),
    }
    return StoreSettings.model_validate(chosen | changes)


@pytest.mark.kafka
async def test_events_are_published_and_read_over_tls_with_a_password(kafka_server: Kafka) -> None:
    settings = settings_for(kafka_server)
    client = connect(settings.mongodb_url)
    event_log = await open_event_log(settings, client, "security")
    try:
        await event_log.publish(TOPIC, [envelope_of("source-1", SOURCE, position=1)])
        async with event_log.subscribe(TOPIC, {}) as subscription:
            messages = await read(subscription, 1)
        assert [message.stream for message in messages] == ["source-1"]
        assert await event_log.last_position(TOPIC, messages[0].store_id) == messages[0].position
        assert (await event_log.identity()).kind == "kafka"
    finally:
        await event_log.close()
        client.close()


@pytest.mark.kafka
@pytest.mark.parametrize("wrong", ["password", "authority"])
async def test_a_wrong_password_or_an_unknown_certificate_is_rejected(
    kafka_server: Kafka, tmp_path: Path, wrong: str
) -> None:
    strange = tmp_path / "stranger.pem"
    strange.write_text(Authority("stranger").pem)
    changes: dict[str, object] = (
        {"kafka_sasl_password": SecretStr("not the password")}
        if wrong == "password"
        else {"kafka_ssl_ca_file": strange}
    )
    settings = settings_for(kafka_server, **changes)
    client = connect(settings.mongodb_url)
    event_log = await open_event_log(settings, client, "security")
    try:
        with pytest.raises(OSError, match=r"\S") as refusal:
            await event_log.publish(TOPIC, [envelope_of("source-1", SOURCE, position=1)])
        assert "not the password" not in str(refusal.value)
    finally:
        await event_log.close()
        client.close()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"kafka_security_protocol": "SASL_SSL"}, "KAFKA_SASL_USERNAME and KAFKA_SASL_PASSWORD"),
        ({"kafka_sasl_username": "ann"}, "KAFKA_SECURITY_PROTOCOL"),
        ({"kafka_security_protocol": "SSL", "kafka_ssl_cert_file": __file__}, "KAFKA_SSL_KEY_FILE"),
        ({"kafka_ssl_ca_file": __file__}, "KAFKA_SECURITY_PROTOCOL"),
        ({"kafka_security_protocol": "SSL", "kafka_ssl_ca_file": "/nowhere/ca.pem"}, "kafka_ssl_ca_file"),
        ({"database_pool_min": 60}, "DATABASE_POOL_MIN"),
    ],
)
def test_settings_that_would_have_no_effect_or_do_not_fit_are_refused(changes: dict[str, object], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        StoreSettings.model_validate(changes)
