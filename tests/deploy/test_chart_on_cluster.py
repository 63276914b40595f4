"""The chart on a real cluster, in the order of an installation's life: the tests of this module build on each other."""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.chart import service_table
from deploy.testing import load, queue_runs
from deploy.testing.cluster import CommandFailed, Release, load_image, run, until
from libs.contracts.services import SERVICES
from tests.deploy.conftest import API_KEY, SERVICE_IMAGE

pytestmark = pytest.mark.timeout(1200)

REPOSITORY, _, TAG = SERVICE_IMAGE.rpartition(":")
VALUES = (
    "--set-string", f"apiKey={API_KEY}",
    "--set", "database.url=postgresql://db:5432/sync,database.username=ann,database.password=p@ss",
    "--set", f"image.repository={REPOSITORY},image.tag={TAG},defaults.replicas=2",
    # The load comes from one caller.
    "--set-string", "settings.RATE_LIMITS=false",
)  # fmt: skip
POSTGRES_IMAGE = "postgres:15"
TABLE = {row["name"]: row for row in yaml.safe_load(service_table())["services"]}
CONNECT = """
import socket, sys
try:
    socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=2).close()
    print("allowed")
except OSError as error:
    print("refused")
"""


@contextmanager
def load_on(release: Release) -> Iterator[Counter[str]]:
    """Load on the gateway from a pod while the block runs; what it counted is there afterwards."""
    script = Path(load.__file__).read_text()
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "load"},
        "spec": {
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": 60,
            "containers": [
                {
                    "name": "load",
                    "image": SERVICE_IMAGE,
                    "command": ["/opt/datasync/bin/python", "-c", script, f"http://{release.name}:8080", "900"],
                    "env": [{"name": "API_KEY", "value": API_KEY}],
                }
            ],
        },
    }
    counted: Counter[str] = Counter()
    release.kubectl("apply", "-f", "-", input_text=json.dumps(pod))
    release.kubectl("wait", "--for=condition=Ready", "pod/load", "--timeout=60s")
    try:
        yield counted
        release.python("load", "import os, signal; os.kill(1, signal.SIGTERM)")
        release.kubectl("wait", "--for=jsonpath={.status.phase}=Succeeded", "pod/load", "--timeout=60s")
        counted.update(json.loads(release.kubectl("logs", "load").splitlines()[-1]))
    finally:
        release.kubectl("delete", "pod", "load", "--now")


def record_count(release: Release, api_key: str = API_KEY) -> int:
    script = (
        "import json, os, sys, urllib.request as u; "
        "r = u.Request(sys.argv[1], headers={'Authorization': 'Bearer ' + sys.argv[2]}); "
        "print(json.load(u.urlopen(r))['total'])"
    )
    url = f"http://{release.name}:8080/api/v1/sync/records?limit=1"
    return int(release.python(release.pods("worker")[0], script, url, api_key))


def test_an_installation_runs_the_main_job(release: Release) -> None:
    release.install(*VALUES)
    release.test()


def test_every_container_is_restricted(release: Release) -> None:
    for pod in release.items("pods", f"app.kubernetes.io/instance={release.name}"):
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
        for container in pod["spec"]["containers"]:
            security = container["securityContext"]
            assert security["readOnlyRootFilesystem"] is True, container["name"]
            assert security["allowPrivilegeEscalation"] is False
            assert security["capabilities"] == {"drop": ["ALL"]}


def test_pods_reach_what_their_service_calls_and_nothing_else(release: Release) -> None:
    """Every pair of services, and MongoDB and Kafka, by a connection from inside of the pod."""
    stores = {"mongodb": 27017, "kafka": 9092}
    expected, found = {}, {}
    for caller, row in TABLE.items():
        pod = release.pods(row["kubernetesName"])[0]
        # A pod always reaches itself.
        for service in (service for service in SERVICES if service.name != caller):
            called = TABLE[service.name]
            host = release.name if called["isPublic"] else f"{release.name}-{called['kubernetesName']}"
            port = 8080 if called["isPublic"] else called["port"]
            found[caller, service.name] = release.python(pod, CONNECT, host, str(port)).strip()
            is_open = called["isPublic"] and caller == "worker"
            expected[caller, service.name] = "allowed" if service.name in row["calls"] or is_open else "refused"
        for store, port in stores.items():
            found[caller, store] = release.python(pod, CONNECT, f"{release.name}-{store}", str(port)).strip()
            uses = row["usesMongodb"] if store == "mongodb" else row["usesKafka"]
            expected[caller, store] = "allowed" if uses else "refused"
    assert found == expected


def test_an_upgrade_under_load_fails_no_request(release: Release) -> None:
    """To another tag of the image: there is no released chart yet that could be upgraded from."""
    newer = f"{REPOSITORY}:newer"
    run("docker", "tag", SERVICE_IMAGE, newer)
    load_image(newer)
    before = record_count(release)
    with load_on(release) as counted:
        release.upgrade("--reset-then-reuse-values", "--set", "image.tag=newer")
    assert set(counted) == {"POST 201", "GET 200"}
    assert counted["POST 201"] > 100
    assert record_count(release) == before + counted["POST 201"]
    images = {
        container["image"]
        for pod in release.items("pods", f"app.kubernetes.io/instance={release.name}")
        for container in pod["spec"]["containers"]
        if REPOSITORY in container["image"]
    }
    assert images == {newer}


def test_evictions_one_after_the_other_fail_no_request(release: Release) -> None:
    """As a drained node evicts: the second pod of a service stays until the first has been replaced."""
    with load_on(release) as counted:
        for component in (row["kubernetesName"] for row in TABLE.values()):
            first, second = release.pods(component)
            assert evict(release, first)
            assert not evict(release, second), f"the budget of {component} does not hold"
            until(partial(has_ready, release, component, 2), f"{component} is replaced")
    assert set(counted) == {"POST 201", "GET 200"}


def evict(release: Release, pod: str) -> bool:
    """Whether the pod's budget allows it."""
    eviction = {
        "apiVersion": "policy/v1",
        "kind": "Eviction",
        "metadata": {"name": pod, "namespace": release.namespace},
    }
    path = f"/api/v1/namespaces/{release.namespace}/pods/{pod}/eviction"
    try:
        run("kubectl", "create", "--raw", path, "-f", "-", input_text=json.dumps(eviction))
    except CommandFailed as error:
        if "disruption budget" not in str(error):
            raise
        return False
    return True


def has_ready(release: Release, component: str, count: int) -> bool:
    return len(ready_pods(release, component)) >= count


def ready_pods(release: Release, component: str) -> list[str]:
    pods = release.items("pods", f"app.kubernetes.io/component={component}")
    return [pod["metadata"]["name"] for pod in pods if is_ready(pod) and "deletionTimestamp" not in pod["metadata"]]


def test_workers_are_added_while_many_runs_wait(release: Release) -> None:
    """50 runs at one worker, which may become four by their use of CPU, into a volume that workers share."""
    scaling = "autoscaling.worker.enabled=true,autoscaling.worker.minReplicas=1,autoscaling.worker.maxReplicas=4"
    lake = "parquet.enabled=true,parquet.accessMode=ReadWriteOnce,parquet.mountPath=/lake"
    release.upgrade(*VALUES, "--set", f"{scaling},{lake}")
    until(lambda: len(release.pods("worker")) == 1, "there is one worker")
    database = {"name": "DATABASE_URL", "value": "postgresql://postgres:only-in-this-pod@127.0.0.1:5432/postgres"}
    host = {"name": "DATABASE_HOST", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}
    script = Path(queue_runs.__file__).read_text()
    command = ["/opt/datasync/bin/python", "-c", script, f"http://{release.name}:8080", "/lake", "50", "2000000"]
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "runs"},
        "spec": {
            "restartPolicy": "Never",
            "initContainers": [
                {
                    "name": "postgres",
                    "image": POSTGRES_IMAGE,
                    "restartPolicy": "Always",
                    "env": [{"name": "POSTGRES_PASSWORD", "value": "only-in-this-pod"}],
                }
            ],
            "containers": [
                {
                    "name": "runs",
                    "image": SERVICE_IMAGE,
                    "command": command,
                    "env": [{"name": "API_KEY", "value": API_KEY}, database, host],
                }
            ],
        },
    }
    release.kubectl("apply", "-f", "-", input_text=json.dumps(pod))
    until(partial(has_ready, release, "worker", 2), "a second worker is ready", timeout_seconds=600)
    release.kubectl("wait", "--for=jsonpath={.status.phase}=Succeeded", "pod/runs", "--timeout=600s")
    assert json.loads(release.kubectl("logs", "runs", "-c", "runs").splitlines()[-1]) == {"completed": 50}
    release.kubectl("delete", "pod", "runs", "--now")


def test_nothing_acknowledged_is_lost_when_pods_are_killed(release: Release) -> None:
    """One pod of each service, then MongoDB and Kafka, without a moment to end."""
    before = record_count(release)
    with load_on(release) as counted:
        for component in [*(row["kubernetesName"] for row in TABLE.values()), "kafka", "mongodb"]:
            [pod, *_] = release.pods(component)
            release.kubectl("delete", "pod", pod, "--force", "--grace-period=0")
            until(lambda: all_ready(release), f"everything is ready after {pod} was killed")
    # A creation without an answer may have happened.
    without_answer = (
        sum(count for outcome, count in counted.items() if outcome.startswith("POST")) - counted["POST 201"]
    )
    assert before + counted["POST 201"] <= record_count(release) <= before + counted["POST 201"] + without_answer
    release.test()


def all_ready(release: Release) -> bool:
    return all(is_ready(pod) for pod in release.items("pods", f"app.kubernetes.io/instance={release.name}"))


def is_ready(pod: dict[str, Any]) -> bool:
    conditions = pod["status"].get("conditions", ())
    return any(condition["type"] == "Ready" and condition["status"] == "True" for condition in conditions)


def test_uninstalling_leaves_the_volumes_and_what_opens_them(release: Release) -> None:
    release.uninstall()
    left = {
        f"{item['kind']}/{item['metadata']['name']}"
        for kind in (
            "all",
            "secrets",
            "configmaps",
            "networkpolicies",
            "poddisruptionbudgets",
            "pvc",
            "serviceaccounts",
        )
        for item in release.items(kind)
        if "deletionTimestamp" not in item["metadata"]
    }
    assert left - {"ConfigMap/kube-root-ca.crt", "ServiceAccount/default"} == {
        "PersistentVolumeClaim/data-datasync-mongodb-0",
        "PersistentVolumeClaim/data-datasync-kafka-0",
        "PersistentVolumeClaim/datasync-parquet",
        "Secret/datasync-mongodb",
        "Secret/datasync-encryption",
    }
