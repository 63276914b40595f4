"""``make helm-repo`` makes a repository from which Helm installs only what the key's owner has signed."""

import shutil
import subprocess
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from deploy.testing.cluster import CommandFailed, run

ROOT = Path(__file__).resolve().parents[2]
OWNER = "DataSync charts"

pytestmark = pytest.mark.skipif(
    shutil.which("helm") is None or shutil.which("gpg") is None, reason="helm or gpg is not on the PATH"
)


@pytest.fixture(scope="module")
def keyring(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A key pair in the format that Helm reads: ``secret.gpg`` and ``public.gpg``."""
    directory = tmp_path_factory.mktemp("keyring")
    home = directory / "home"
    home.mkdir(mode=0o700)

    def gpg(*arguments: str) -> bytes:
        command = ["gpg", "--homedir", str(home), "--batch", "--passphrase", "", *arguments]
        return subprocess.run(command, capture_output=True, check=True).stdout

    gpg("--quick-generate-key", OWNER, "rsa2048", "sign", "never")
    (directory / "secret.gpg").write_bytes(gpg("--export-secret-keys"))
    (directory / "public.gpg").write_bytes(gpg("--export"))
    subprocess.run(["gpgconf", "--homedir", str(home), "--kill", "gpg-agent"], check=True)
    return directory


@pytest.fixture
def repository(keyring: Path, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The URL and the folder of a signed repository."""
    charts = tmp_path / "charts"
    charts.mkdir()
    handler = partial(SimpleHTTPRequestHandler, directory=str(charts))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        url = f"http://127.0.0.1:{server.server_port}"
        run(
            "make", "-C", str(ROOT), "helm-repo", f"CHARTS={charts}", f"CHART_REPOSITORY={url}",
            f"KEY={OWNER}", f"KEYRING={keyring}/secret.gpg",
        )  # fmt: skip
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield url, charts
        finally:
            server.shutdown()


@pytest.fixture(autouse=True)
def helms_own_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"HELM_{name}_HOME", str(tmp_path / name.lower()))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def pull(url: str, keyring: Path, destination: Path) -> None:
    run("helm", "repo", "add", "datasync", url)
    destination.mkdir()
    run(
        "helm", "pull", "datasync/datasync", "--verify", "--keyring", f"{keyring}/public.gpg",
        "--destination", str(destination),
    )  # fmt: skip


def test_a_signed_chart_is_pulled_and_verified(repository: tuple[str, Path], keyring: Path, tmp_path: Path) -> None:
    url, charts = repository
    pull(url, keyring, tmp_path / "pulled")
    [archive] = (tmp_path / "pulled").glob("*.tgz")
    assert archive.read_bytes() == (charts / archive.name).read_bytes()
    assert "Chart Hash Verified" in run("helm", "verify", str(archive), "--keyring", f"{keyring}/public.gpg")


@pytest.mark.parametrize(
    ("suffix", "message"), [("tgz", "sha256 sum does not match"), ("tgz.prov", "openpgp: invalid signature")]
)
def test_a_changed_byte_is_noticed(repository: tuple[str, Path], keyring: Path, suffix: str, message: str) -> None:
    _, charts = repository
    [archive] = charts.glob("*.tgz")
    [changed] = charts.glob(f"*.{suffix}")
    content = bytearray(changed.read_bytes())
    content[content.index(b"description:") if suffix == "tgz.prov" else len(content) // 2] ^= 1
    changed.write_bytes(content)
    with pytest.raises(CommandFailed, match=message):
        run("helm", "verify", str(archive), "--keyring", f"{keyring}/public.gpg")


def test_a_chart_signed_by_somebody_else_is_refused(repository: tuple[str, Path], tmp_path: Path) -> None:
    url, _ = repository
    (tmp_path / "public.gpg").write_bytes(b"")
    with pytest.raises(CommandFailed, match="openpgp: signature made by unknown entity"):
        pull(url, tmp_path, tmp_path / "pulled")
