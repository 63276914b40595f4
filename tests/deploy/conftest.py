"""What the deployment is tested with. Where an engine or a cluster is missing, tests are skipped and name it."""

import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator

import pytest

from deploy.testing.cluster import Release, load_image, missing_parts, run

API_KEY = "a-key-for-tests"
SERVICE_IMAGE = os.environ.get("SERVICE_IMAGE", "datasync-service:dev")
SUITE_IMAGE = os.environ.get("SUITE_IMAGE", "datasync:dev")


@pytest.fixture(scope="session")
def engine() -> None:
    """A Docker engine that has the images of ``make image``."""
    if shutil.which("docker") is None:
        pytest.skip("there is no docker command")
    if subprocess.run(["docker", "version"], capture_output=True, check=False).returncode:
        pytest.skip("no Docker engine answers")
    for image in (SERVICE_IMAGE, SUITE_IMAGE):
        if subprocess.run(["docker", "image", "inspect", image], capture_output=True, check=False).returncode:
            pytest.skip(f"the engine has no image {image}: run make image")


@pytest.fixture(scope="session")
def cluster() -> None:
    """A Kubernetes cluster that has the image of one service."""
    if reason := missing_parts():
        pytest.skip(reason)
    load_image(SERVICE_IMAGE)


@pytest.fixture(scope="module")
def release(cluster: None) -> Iterator[Release]:
    """A namespace for a release, deleted afterwards with everything in it."""
    found = Release(f"datasync-test-{uuid.uuid4().hex[:8]}")
    run("kubectl", "create", "namespace", found.namespace)
    try:
        yield found
    finally:
        run("kubectl", "delete", "namespace", found.namespace, "--wait=true", "--timeout=180s")
