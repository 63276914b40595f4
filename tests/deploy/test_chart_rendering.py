"""The chart renders to valid manifests for every set of values under ``helm/datasync/ci`` and for production."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from libs.contracts.services import SERVICES

CHART = Path(__file__).resolve().parents[2] / "helm/datasync"
VALUE_SETS = sorted((*(CHART / "ci").glob("*-values.yaml"), CHART / "values-production.yaml"))
KUBERNETES = "1.34"
# Kinds that are defined by what the cluster has installed.
CUSTOM = {"ServiceMonitor", "PrometheusRule", "ScaledObject", "HTTPRoute"}

pytestmark = pytest.mark.skipif(shutil.which("helm") is None, reason="helm is not on the PATH")


def helm(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(["helm", *arguments], capture_output=True, text=True, check=False)


def rendered(values: Path) -> list[dict[str, Any]]:
    done = helm("template", "ds", str(CHART), "--kube-version", KUBERNETES, "-f", str(values))
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.safe_load_all(done.stdout) if document]


@pytest.fixture(params=VALUE_SETS, ids=lambda path: path.stem)
def values(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


def test_there_are_enough_value_sets() -> None:
    assert len(VALUE_SETS) >= 6


def test_the_chart_passes_lint(values: Path) -> None:
    done = helm("lint", str(CHART), "--strict", "-f", str(values))
    assert done.returncode == 0, done.stdout


def test_every_manifest_is_valid(values: Path) -> None:
    for document in rendered(values):
        if document["kind"] not in CUSTOM:
            kubernetes_validate.validate(document, KUBERNETES, strict=True)


def test_every_pod_is_restricted_bounded_and_probed(values: Path) -> None:
    for document in rendered(values):
        pod = document if document["kind"] == "Pod" else document.get("spec", {}).get("template")
        if pod is None or "containers" not in pod.get("spec", {}):
            continue
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        for container in (*spec["containers"], *spec.get("initContainers", ())):
            assert container["securityContext"]["readOnlyRootFilesystem"] is True, container["name"]
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["limits"]["memory"]
            assert container["resources"]["requests"]["cpu"]
            assert not container["image"].endswith(":latest")
            if document["kind"] in ("Deployment", "StatefulSet"):
                assert {"startupProbe", "livenessProbe", "readinessProbe"} <= container.keys()


def test_every_service_of_the_table_is_deployed(values: Path) -> None:
    deployed = {
        document["spec"]["template"]["spec"]["containers"][0]["args"][1]
        for document in rendered(values)
        if document["kind"] == "Deployment"
    }
    assert deployed == {service.name for service in SERVICES}


def test_no_secret_is_in_a_pod_or_a_config_map(values: Path) -> None:
    documents = rendered(values)
    secrets = {
        key: value
        for document in documents
        if document["kind"] == "Secret"
        for key, value in document["data"].items()
        if key not in ("username", "VERIFYING_KEY")
    }
    assert secrets
    for document in documents:
        if document["kind"] != "Secret":
            text = json.dumps(document)
            for key, value in secrets.items():
                assert value not in text, key
                assert re.search(rf'"{key}"[^{{}}]*"value":', text) is None, key


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "/apiKey"),
        (("--set", "apiKey=short"), "/apiKey"),
        (("--set", "apiKey=long-enough,services.workr.replicas=2"), "workr"),
        (("--set", "apiKey=long-enough,drainSecs=2"), "drainSecs"),
        (("--set", "apiKey=long-enough,kafka.securityProtocol=TLS"), "/kafka/securityProtocol"),
        (("--set", "apiKey=long-enough,mongodb.url=postgres://x"), "/mongodb/url"),
    ],
)
def test_values_that_are_wrong_are_named(arguments: tuple[str, ...], message: str) -> None:
    done = helm("template", "ds", str(CHART), "--kube-version", KUBERNETES, *arguments)
    assert done.returncode != 0
    assert message in done.stderr


def test_a_user_name_and_a_password_become_a_part_of_the_url() -> None:
    done = helm(
        "template", "ds", str(CHART), "--kube-version", KUBERNETES, "--show-only", "templates/secrets.yaml",
        "--set", "apiKey=long-enough,database.url=postgresql://db:5432/sync,database.username=a b,database.password=p@",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    settings = next(
        document
        for document in yaml.safe_load_all(done.stdout)
        if document and document["metadata"]["name"].endswith("-settings")
    )
    decoded = subprocess.run(
        ["base64", "-d"], input=settings["data"]["DB_URL"], capture_output=True, text=True, check=True
    )
    assert decoded.stdout == "postgresql://a%20b:p%40@db:5432/sync"
