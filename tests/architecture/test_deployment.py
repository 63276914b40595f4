"""Chart and Compose file agree with the table of services and with the code."""

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from deploy import chart
from libs.contracts.services import SERVICES, Service
from libs.process import telemetry

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "helm/datasync"
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
ALERTS = yaml.safe_load((CHART / "files/alerts.yaml").read_text())


@pytest.mark.parametrize(
    ("path", "made"),
    [
        ("files/services.yaml", chart.service_table),
        ("values.schema.json", chart.schema),
        ("README.md", chart.readme),
    ],
)
def test_the_charts_files_are_as_the_code_makes_them(path: str, made: Any) -> None:
    assert (CHART / path).read_text() == made(), "run make docs"


@pytest.mark.parametrize("path", ["values-production.yaml", *(f"ci/{path.name}" for path in CHART.glob("ci/*.yaml"))])
def test_values_meet_the_schema(path: str) -> None:
    defaults, values = (yaml.safe_load((CHART / name).read_text()) for name in ("values.yaml", path))
    jsonschema.validate(_merged(defaults, values), json.loads((CHART / "values.schema.json").read_text()))


def _merged(defaults: Any, values: Any) -> Any:
    if not isinstance(defaults, dict) or not isinstance(values, dict):
        return values
    return {**defaults, **{name: _merged(defaults.get(name), value) for name, value in values.items()}}


@pytest.mark.parametrize("service", SERVICES, ids=lambda service: service.name)
def test_compose_runs_every_service_as_the_table_says(service: Service) -> None:
    composed = COMPOSE["services"][service.name]
    assert composed["command"] == ["serve", service.name]
    environment = composed["environment"]
    assert environment["PORT"] == str(service.port)
    for other in SERVICES:
        if other.callers:
            assert environment[other.url_setting.upper()] == f"http://{other.name}:{other.port}"
    # Its keys, and nobody else's.
    keys = [volume for volume in composed["volumes"] if volume.startswith("keys-")]
    assert keys == [f"keys-{service.name}:/keys:ro"]
    assert f"keys-{service.name}:/keys/{service.name}" in COMPOSE["services"]["setup"]["volumes"]
    assert ("ports" in composed) == service.is_public
    assert composed["read_only"]


def test_compose_limits_and_checks_everything_that_stays() -> None:
    for name, service in COMPOSE["services"].items():
        if "restart" in service:
            assert "mem_limit" in service, name
            checked = "healthcheck" in service or service["image"].startswith("${DATASYNC_IMAGE")
            assert checked or service.get("profiles") == ["observability"], name


def test_prometheus_of_compose_reads_every_service() -> None:
    config = yaml.safe_load((ROOT / "deploy/compose/prometheus/prometheus.yml").read_text())
    read = {
        (name, found["port"])
        for job in config["scrape_configs"]
        for found in job["dns_sd_configs"]
        for name in found["names"]
    }
    assert read == {(service.name, service.port) for service in SERVICES}


def test_the_dashboard_reads_the_data_source_that_grafana_is_given() -> None:
    compose = ROOT / "deploy/compose/grafana"
    [given] = yaml.safe_load((compose / "provisioning/datasources/prometheus.yaml").read_text())["datasources"]
    panels = json.loads((compose / "dashboards/datasync.json").read_text())["panels"]
    assert {panel["datasource"]["uid"] for panel in panels} == {given["uid"]}


def test_alerts_dashboards_and_autoscaling_name_metrics_that_exist() -> None:
    exist = {family.name for family in telemetry.REGISTRY.collect()}
    dashboard = (ROOT / "deploy/compose/grafana/dashboards/datasync.json").read_text()
    rules = [rule["expr"] for group in ALERTS["groups"] for rule in group["rules"]]
    keda = re.search("query: (.*)", (CHART / "templates/autoscaling.yaml").read_text())
    assert keda is not None
    queries = [*rules, *re.findall(r'"expr": "(.*)"', dashboard), keda[1]]
    named = set(re.findall(r"\bdatasync_[a-z_]+", " ".join(queries)))
    assert named
    for name in named:
        assert re.sub(r"_(total|bucket|count|sum)$", "", name) in exist | {re.sub("_total$", "", one) for one in exist}


def test_the_operators_page_names_every_metric_with_an_alert() -> None:
    page = "".join(path.read_text() for path in (ROOT / "docs").rglob("*.md"))
    for group in ALERTS["groups"]:
        for rule in group["rules"]:
            for name in re.findall(r"\bdatasync_[a-z_]+", rule["expr"]):
                assert name.removesuffix("_bucket") in page, name
