"""Configurations at the door: what is accepted, what is refused by name, which fields are secret."""

import json
import subprocess
import sys
from typing import Any

import jsonschema
import pytest

from libs.connectors import registry
from libs.core.errors import InvalidInput

POSTGRES = {"host": "db.example.com", "database": "shop", "username": "ada", "password": "s3cret"}


def test_importing_the_registry_loads_no_driver() -> None:
    code = "import sys, libs.connectors.registry; print([m for m in ('asyncpg', 'pyarrow') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_types_have_one_name_and_aliases() -> None:
    assert registry.types("source") == ("postgres",)
    assert registry.types("destination") == ("postgres", "parquet")
    assert registry.canonical_type("source", "PostgreSQL") == "postgres"
    with pytest.raises(InvalidInput, match="supported are postgres, parquet"):
        registry.canonical_type("destination", "oracle")


@pytest.mark.parametrize("role", ["source", "destination"])
def test_a_specification_is_a_flat_json_schema_in_the_order_of_the_form(role: registry.Role) -> None:
    schema = registry.spec(role, "postgres")["jsonschema"]
    assert "$defs" not in schema
    assert list(schema["properties"])[:5] == ["host", "port", "database", "username", "password"]
    assert schema["required"] == ["host", "database", "username"]
    assert schema["properties"]["password"]["format"] == "password"
    assert schema["properties"]["ssl"]["properties"]["mode"]["enum"][0] == "disable"
    orders = [field["order"] for field in schema["properties"].values()]
    assert len(set(orders)) == len(orders)


FORMS: list[tuple[registry.Role, str, dict[str, Any]]] = [
    ("source", "postgres", POSTGRES),
    ("destination", "postgres", POSTGRES),
    ("destination", "parquet", {"writer": {"local_path": "/data"}}),
]


@pytest.mark.parametrize(("role", "kind", "typed"), FORMS)
def test_a_form_filled_with_its_defaults_is_a_valid_configuration(
    role: registry.Role, kind: str, typed: dict[str, Any]
) -> None:
    """As React JSON Schema Form fills it: what was typed, and the defaults of all other fields."""

    def filled(schema: dict[str, Any], given: Any) -> Any:
        if "properties" not in schema:
            return schema.get("default") if given is None else given
        return {name: filled(field, (given or {}).get(name)) for name, field in schema["properties"].items()}

    def check_defaults(schema: dict[str, Any]) -> None:
        if "default" in schema:
            jsonschema.validate(schema["default"], schema)
        for field in schema.get("properties", {}).values():
            check_defaults(field)

    schema = registry.spec(role, kind)["jsonschema"]
    check_defaults(schema)
    config = filled(schema, typed)
    jsonschema.validate(config, schema)
    registry.parse_config(role, kind, config)


def test_a_form_asks_for_names_and_values_and_hides_what_can_not_be_chosen() -> None:
    parameters = registry.spec("source", "postgres")["jsonschema"]["properties"]["jdbc_url_params"]
    assert parameters["additionalProperties"] is True
    assert json.loads(registry.spec("destination", "parquet")["uischema"]) == {"type": {"ui:widget": "hidden"}}


def test_secret_fields_are_found_in_nested_settings() -> None:
    assert registry.secret_fields("source", "postgres") == {("password",), ("ssl", "client_key")}
    assert registry.secret_fields("destination", "parquet") == frozenset()


def test_the_address_is_where_the_data_goes() -> None:
    assert registry.address_of("source", "postgres", POSTGRES) == "db.example.com:5432"
    other = POSTGRES | {"host": "DB.example.com", "port": "5432", "password": "masked"}
    assert registry.address_of("source", "postgresql", other) == "db.example.com:5432"
    nested = {"type": "PARQUET", "writer": {"local_path": "/data/lake/"}}
    assert registry.address_of("destination", "parquet", nested) == "/data/lake"
    assert registry.address_of("destination", "parquet", {"local_path": "/data/lake"}) == "/data/lake"


@pytest.mark.parametrize(
    "extra",
    [
        {"ssh_config": {}},
        {"ssh_config": None},
        {"ssh_config": {"type": "no_tunnel", "host": "", "port": 22}},
        {"update_method": {"type": "Standalone"}},
        {"update_method": {}},
        {"schemas": None},
        {"jdbc_url_params": None, "max_threads": 3, "retry_count": 3},
        {"ssl": {"mode": "verify-full", "server_ca": "-----BEGIN CERTIFICATE-----"}},
    ],
)
def test_what_front_ends_send_for_empty_fields_is_accepted(extra: dict[str, Any]) -> None:
    registry.parse_config("source", "postgres", POSTGRES | extra)


@pytest.mark.parametrize(
    ("extra", "field", "words"),
    [
        ({"ssh_config": {"host": "jump"}}, "config.ssh_config", "SSH tunnel is not supported"),
        ({"update_method": {"type": "CDC"}}, "config.update_method", "CDC"),
        ({"jdbc_url_params": {"socketFactory": "x"}}, "config.jdbc_url_params", "socketFactory is not supported"),
        ({"port": 70000}, "config.port", "less than or equal to 65535"),
        ({"hots": "x"}, "config.hots", "is not a known field"),
        ({"host": "/var/run/postgresql"}, "config.host", "one host name"),
        ({"ssl": {"mode": "sometimes"}}, "config.ssl.mode", "disable"),
        ({"ssl": {"client_cert": "x"}}, "config.ssl", "come together"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(extra: dict[str, Any], field: str, words: str) -> None:
    with pytest.raises(InvalidInput) as refusal:
        registry.parse_config("source", "postgres", POSTGRES | extra)
    assert [error.field for error in refusal.value.errors] == [field]
    assert words in refusal.value.errors[0].message
    assert "s3cret" not in refusal.value.message


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"local_path": "lake"}, "absolute path"),
        ({"local_path": "/data/../etc"}, "must not contain"),
        ({"writer": {"local_path": "/data", "s3_bucket": "b"}}, "s3_bucket is not supported"),
        ({"type": "ICEBERG", "local_path": "/data"}, "PARQUET"),
        ({}, "config.local_path: is required"),
    ],
)
def test_parquet_goes_to_an_absolute_local_path_alone(config: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        registry.parse_config("destination", "parquet", config)


def test_the_forms_empty_object_store_fields_are_no_object_store() -> None:
    writer = {"local_path": "/data", "s3_bucket": "", "s3_region": "", "s3_access_key": "", "s3_secret_key": ""}
    registry.parse_config("destination", "parquet", {"type": "PARQUET", "writer": writer})
