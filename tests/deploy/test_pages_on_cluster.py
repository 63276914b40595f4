"""The pages on Kubernetes and on its backup, followed word by word on a real cluster: the tests build on each other."""

import json
import os
import re
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from deploy.testing.cluster import CommandFailed, Release, load_image, run, until
from libs.suite.child_process import free_port
from libs.testing.pages import ROOT, adapted, blocks, follow
from tests.deploy.conftest import SERVICE_IMAGE
from tests.deploy.test_chart_on_cluster import TABLE, all_ready, record_count

pytestmark = pytest.mark.timeout(1200)

PAGE = "docs/operations/kubernetes.md"
API_KEY = "your-api-key"
CHART = ROOT / "helm/datasync"
CREATE = """
import json, os, sys, urllib.request as u
body = {"developerId": "ann", "resourceType": "THING", "resourceKey": sys.argv[3], "data": {}}
headers = {"Authorization": "Bearer " + sys.argv[2], "Content-Type": "application/json"}
u.urlopen(u.Request(sys.argv[1], json.dumps(body).encode(), headers)).close()
"""
METRICS = """
import sys, urllib.request as u
print(u.urlopen(f"http://127.0.0.1:{sys.argv[1]}/metrics").read().decode())
"""


@pytest.fixture(scope="module")
def environment(release: Release, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A reader's shell: ``kubectl`` and ``helm`` act on the namespace of this module."""
    directory = tmp_path_factory.mktemp("shell")
    (directory / "kubeconfig").write_text(run("kubectl", "config", "view", "--raw", "--flatten"))
    found = {**os.environ, "KUBECONFIG": str(directory / "kubeconfig"), "NO_PROXY": "127.0.0.1,localhost"}
    for name in ("CACHE", "CONFIG", "DATA"):
        found[f"HELM_{name}_HOME"] = str(directory / name.lower())
    run("kubectl", "config", "set-context", "--current", "--namespace", release.namespace, environment=found)
    return found


@pytest.fixture(scope="module")
def charts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of the repository that ``make helm-repo`` makes; the cluster has the image of its chart."""
    directory = tmp_path_factory.mktemp("charts")
    version = yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"]
    image = f"{yaml.safe_load((CHART / 'values.yaml').read_text())['image']['repository']}:{version}"
    run("docker", "tag", SERVICE_IMAGE, image)
    load_image(image)
    handler = partial(SimpleHTTPRequestHandler, directory=str(directory))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        url = f"http://127.0.0.1:{server.server_port}"
        run("make", "-C", str(ROOT), "helm-repo", f"CHARTS={directory}", f"CHART_REPOSITORY={url}")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield url
        finally:
            server.shutdown()


def followed(script: str, environment: dict[str, str], timeout_seconds: float = 600) -> str:
    done = follow(script, environment, timeout_seconds=timeout_seconds)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_datasync_is_installed_and_tried(release: Release, environment: dict[str, str], charts: str) -> None:
    install, request = blocks(PAGE, "Try it")
    followed(adapted(install, {"https://charts.datasync.io": charts}), environment)
    port = str(free_port())
    here = {"8080:8080": f"{port}:8080", "localhost:8080": f"localhost:{port}"}
    answer = followed(adapted(request, here), environment)
    assert json.loads(answer.splitlines()[-1])["success"] is True


def test_a_copy_of_the_running_installation_is_put_back(
    release: Release, environment: dict[str, str], tmp_path: Path
) -> None:
    """What was written after the copy is gone, for every service and for those that follow it; the rest works."""
    backup, restore, declare, accept = blocks(
        "docs/operations/backup.md", "Kubernetes, and MongoDB and Kafka of your own"
    )
    create(release, "before")
    count = record_count(release, API_KEY)
    followed(adapted(backup, BACKUP=str(tmp_path)), environment)
    create(release, "after")
    release.test()
    assert record_count(release, API_KEY) == count + 1

    followed(f"BACKUP={tmp_path}\n{restore}", environment)
    followed(declare, environment)
    followers = ("job_orchestrator", "catalog")
    until(lambda: all(waits_for_repair(release, service) for service in followers), "the followers stop")
    assert followed(accept, environment).count("built from the owner's present store") == len(followers)
    until(lambda: all_ready(release), "every service is ready")
    assert record_count(release, API_KEY) == count
    create(release, "after")
    release.test()


def create(release: Release, key: str) -> None:
    url = f"http://{release.name}:8080/api/v1/sync/records"
    release.python(release.pods("worker")[0], CREATE, url, API_KEY, key)


def waits_for_repair(release: Release, service: str) -> bool:
    """Whether it has stopped following a topic, as its metrics say."""
    row = TABLE[service]
    try:
        [pod] = release.pods(row["kubernetesName"])
        metrics = release.python(pod, METRICS, str(row["port"]))
    except (ValueError, CommandFailed):
        return False
    return re.search(r"^datasync_consumer_stopped\{.*\} 1\.0$", metrics, re.MULTILINE) is not None


def test_the_secret_and_the_values_of_production_are_accepted(environment: dict[str, str], charts: str) -> None:
    """By the API server; this cluster has no room for as many pods as they ask for."""
    secret, install = blocks(PAGE, "Production")
    followed(adapted(secret, {"generic datasync ": "generic production "}), environment)
    made = json.loads(followed("kubectl get secret production -o json", environment))
    assert made["data"].keys() == {"API_KEY", "MONGODB_URL", "KAFKA_SASL_USERNAME", "KAFKA_SASL_PASSWORD"}
    here = {"install datasync ": "install production ", "values-production.yaml": str(CHART / "values-production.yaml")}
    # The kinds of the Prometheus operator are unknown to this cluster.
    options = "existingSecret=production,monitoring.serviceMonitor=false,monitoring.prometheusRule=false"
    install = f"{adapted(install, here).rstrip()} --dry-run=server --set {options}"
    assert "host: datasync.example.com" in followed(install, environment)
