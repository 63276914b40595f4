"""Writes the chart's files that are made from others: ``python -m deploy.chart`` (a part of ``make docs``).

The table of services comes from ``libs/contracts/services.py``; the schema of the values and the page that describes
them come from ``values.yaml``, whose comments ``# -- …`` describe the value below them.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from libs.contracts.services import SERVICES, Service

CHART = Path(__file__).parents[1] / "helm/datasync"
HEADER = "# Written by `make docs` from libs/contracts/services.py.\n"

# What a value's default does not say about it, by its path.
CONSTRAINTS: Mapping[str, Mapping[str, Any]] = {
    "image.pullPolicy": {"enum": ["Always", "IfNotPresent", "Never"]},
    "kafka.securityProtocol": {"enum": ["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"]},
    "kafka.saslMechanism": {"enum": ["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"]},
    "service.type": {"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
    "topologySpread": {"enum": ["", "ScheduleAnyway", "DoNotSchedule"]},
    "parquet.accessMode": {"enum": ["ReadWriteMany", "ReadWriteOnce"]},
    "drainSeconds": {"minimum": 0},
    "terminationGracePeriodSeconds": {"minimum": 1},
    "defaults.replicas": {"minimum": 0},
    "mongodb.url": {"pattern": "^(mongodb(\\+srv)?://.+)?$"},
    "networkPolicy.externalPorts": {"items": {"type": "integer"}},
}
# Objects of Kubernetes and free settings: any key.
FREE = {"resources", "settings", "podAnnotations", "nodeSelector", "affinity", "annotations", "labels"}


def main() -> None:
    (CHART / "files/services.yaml").write_text(service_table())
    (CHART / "values.schema.json").write_text(schema())
    (CHART / "README.md").write_text(readme())


def service_table() -> str:
    """The services as the chart's templates read them."""
    return HEADER + yaml.safe_dump({"services": [_row(service) for service in SERVICES]}, sort_keys=False)


def _row(service: Service) -> dict[str, object]:
    forwards_to = {other.name for other in SERVICES if other.is_forwarded_to} if service.is_public else set()
    return {
        "name": service.name,
        "kubernetesName": service.name.replace("_", "-"),
        "port": service.port,
        "urlSetting": service.url_setting.upper() if service.callers else None,
        "isPublic": service.is_public,
        "usesMongodb": service.has_store or service.is_public,
        "usesKafka": service.uses_event_log,
        "secrets": [secret.upper() for secret in service.secrets],
        "calls": sorted(service.calls | forwards_to),
        "callers": sorted(service.callers),
    }


def schema() -> str:
    """The JSON Schema of the values."""
    described = {value.path: value.about for value in described_values()}
    whole = _schema_of("", yaml.safe_load((CHART / "values.yaml").read_text()), described)
    service = {**whole["properties"]["defaults"], "description": "What differs from `defaults`."}
    whole["properties"]["services"] = {
        "type": "object",
        "description": described["services"],
        "properties": {row.name: service for row in SERVICES},
        "additionalProperties": False,
    }
    whole["properties"]["global"] = {"type": "object"}
    # An API key is needed: by value, or in a Secret.
    whole["anyOf"] = [
        {"properties": {"apiKey": {"minLength": 8}}},
        {"properties": {"existingSecret": {"minLength": 1}}},
    ]
    return json.dumps({"$schema": "http://json-schema.org/draft-07/schema#", **whole}, indent=2) + "\n"


def _schema_of(path: str, value: object, described: Mapping[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {"description": described[path]} if path in described else {}
    match value:
        case dict() if path.rpartition(".")[2] in FREE:
            found["type"] = "object"
        case dict():
            inner = {key: _schema_of(f"{path}.{key}".lstrip("."), item, described) for key, item in value.items()}
            found |= {"type": "object", "properties": inner, "additionalProperties": False}
        case bool():
            found["type"] = "boolean"
        case int():
            found["type"] = "integer"
        case float():
            found["type"] = "number"
        case list():
            found["type"] = "array"
        case _:
            found["type"] = "string"
    return {**found, **CONSTRAINTS.get(path, {})}


@dataclass(frozen=True, slots=True)
class DescribedValue:
    """A value of ``values.yaml`` with the comment above it."""

    path: str
    about: str
    default: object


def described_values() -> Iterator[DescribedValue]:
    """In the order of the file."""
    text = (CHART / "values.yaml").read_text()
    defaults = yaml.safe_load(text)
    path: list[tuple[int, str]] = []
    about: list[str] = []
    for line in text.splitlines():
        stripped = line.strip()
        if stripped.startswith("# -- "):
            about = [stripped[5:]]
        elif stripped.startswith("#"):
            if about:
                about.append(stripped[2:])
        elif ":" in stripped:
            indent = len(line) - len(line.lstrip())
            path = [(depth, key) for depth, key in path if depth < indent]
            path.append((indent, stripped.partition(":")[0]))
            keys = [key for _, key in path]
            if about:
                yield DescribedValue(".".join(keys), " ".join(about), _at(defaults, keys))
            about = []
        else:
            about = []


def _at(values: Any, keys: list[str]) -> object:
    for key in keys:
        values = values[key]
    return values


def readme() -> str:
    """The chart's page: how it is installed, and its values."""
    rows = [
        f"| `{value.path}` | {value.about.replace('|', '&#124;')} | `{json.dumps(value.default)}` |"
        for value in described_values()
        if value.path != "services"
    ]
    return (CHART / "README.md.in").read_text() + "\n".join(rows) + "\n"


if __name__ == "__main__":
    main()
