"""The chart renders to valid manifests for every set of values under ``helm/datasync/ci`` and for production."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from libs.contracts.services import SERVICES

CHART = Path(__file__).resolve().parents[2] / "helm/datasync"
VALUE_SETS = sorted((*(CHART / "ci").glob("*-values.yaml"), CHART / "values-production.yaml"))
# The values that turn these off.
WITHOUT_ACCOUNT = WITHOUT_SPREAD = [CHART / "ci/no-kafka-values.yaml"]
KUBERNETES = "1.34"
# Kinds that are defined by what the cluster has installed.
CUSTOM = {path.stem: json.loads(path.read_text()) for path in (Path(__file__).parent / "schemas").glob("*.json")}

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
        if schema := CUSTOM.get(document["kind"]):
            jsonschema.validate(document, schema)
        else:
            kubernetes_validate.validate(document, KUBERNETES, strict=True)


def test_every_custom_kind_is_rendered_by_some_values() -> None:
    kinds = {document["kind"] for path in VALUE_SETS for document in rendered(path)}
    assert set(CUSTOM) == {"HTTPRoute", "PrometheusRule", "ScaledObject", "ServiceMonitor"}
    assert set(CUSTOM) <= kinds


@pytest.mark.parametrize("kind", sorted(CUSTOM))
def test_a_misspelt_property_is_refused(kind: str) -> None:
    documents = (document for path in VALUE_SETS for document in rendered(path))
    document = next(document for document in documents if document["kind"] == kind)
    with pytest.raises(jsonschema.ValidationError, match="Additional properties"):
        jsonschema.validate({**document, "spec": {**document["spec"], "intervall": "5s"}}, CUSTOM[kind])


def pods(documents: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """The objects that make pods, with the pod's ``metadata`` and ``spec``."""
    for document in documents:
        if document["kind"] == "Pod":
            yield document, document
        elif "template" in document.get("spec", {}):
            yield document, document["spec"]["template"]


def test_every_pod_is_restricted_bounded_and_probed(values: Path) -> None:
    for document, pod in pods(rendered(values)):
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False
        assert (spec["serviceAccountName"] == "default") == (values in WITHOUT_ACCOUNT)
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
        assert not any("hostPath" in volume for volume in spec["volumes"])
        for container in (*spec["containers"], *spec.get("initContainers", ())):
            security = container["securityContext"]
            assert security["readOnlyRootFilesystem"] is True, container["name"]
            assert security["allowPrivilegeEscalation"] is False
            assert security["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["limits"]["memory"]
            assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
            assert re.search(r":(?!latest$)[^:/]+$", container["image"]), "the image has no fixed tag"
            names = [variable["name"] for variable in container.get("env", ())]
            assert len(names) == len(set(names)), "a variable is set twice"
            if document["kind"] in ("Deployment", "StatefulSet"):
                assert {"startupProbe", "livenessProbe", "readinessProbe"} <= container.keys()


def test_the_pods_of_a_service_are_spread_and_replaced_one_by_one(values: Path) -> None:
    documents = rendered(values)
    budgets = [document for document in documents if document["kind"] == "PodDisruptionBudget"]
    for deployment, pod in pods(documents):
        if deployment["kind"] != "Deployment":
            continue
        assert deployment["spec"]["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
        spread = pod["spec"].get("topologySpreadConstraints", [])
        keys = [] if values in WITHOUT_SPREAD else ["kubernetes.io/hostname", "topology.kubernetes.io/zone"]
        assert [one["topologyKey"] for one in spread] == keys
        assert all(selects(one["labelSelector"]["matchLabels"], pod) for one in spread)
        covering = [budget for budget in budgets if selects(budget["spec"]["selector"]["matchLabels"], pod)]
        assert covering or deployment["spec"].get("replicas", 1) == 1


def test_every_selector_and_name_leads_to_something_in_the_chart(values: Path) -> None:
    documents = rendered(values)
    made = {(document["kind"], document["metadata"]["name"]) for document in documents}
    templates = [pod for _, pod in pods(documents)]
    for document in documents:
        name, spec = document["metadata"]["name"], document.get("spec", {})
        match document["kind"]:
            case "Service":
                reached = [pod for pod in templates if selects(spec["selector"], pod)]
                assert reached, name
                ports = {port["name"] for pod in reached for port in pod["spec"]["containers"][0]["ports"]}
                assert {port["targetPort"] for port in spec["ports"]} <= ports
            case "Deployment" | "StatefulSet":
                assert selects(spec["selector"]["matchLabels"], spec["template"]), name
            case "NetworkPolicy":
                assert any(selects(spec["podSelector"]["matchLabels"], pod) for pod in templates), name
            case "PodDisruptionBudget":
                assert any(selects(spec["selector"]["matchLabels"], pod) for pod in templates), name
            case "HorizontalPodAutoscaler" | "ScaledObject":
                assert ("Deployment", spec["scaleTargetRef"]["name"]) in made
    if values not in WITHOUT_ACCOUNT:
        assert all(("ServiceAccount", pod["spec"]["serviceAccountName"]) in made for _, pod in pods(documents))


def selects(labels: dict[str, str], pod: dict[str, Any]) -> bool:
    return bool(labels.items() <= pod["metadata"]["labels"].items())


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
