"""Completes the image's virtual environment: DataSync itself, no files that only development needs, and an SBOM.

Runs in the image's build, with the interpreter of the environment that has pip and the packages of
``requirements/build.txt``.
"""

import json
import shutil
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output import make_outputter
from cyclonedx.schema import OutputFormat, SchemaVersion
from packageurl import PackageURL

# Only what the services never import, by the package that brings it.
NEVER_IMPORTED = (
    "asyncpg/**/*.c",
    "numpy/**/tests",
    "numpy/_core/include",
    "pyarrow/*flight*",
    "pyarrow/include",
    "pyarrow/src",
    "pyarrow/tests",
    "swagger_ui/static/*.map",
    "swagger_ui/static/swagger-editor*",
)
# Stripping them would break the alignment that their own builds gave them, or saves nothing.
KEPT_WHOLE = ("numpy", "pyarrow")


def main(environment: Path) -> None:
    site = next((environment / "lib").glob("python3*/site-packages"))
    run("pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", "/tmp/wheels", ".")
    run("pip", "--python", environment / "bin/python", "install", "--no-deps", *Path("/tmp/wheels").glob("*.whl"))
    for pattern in NEVER_IMPORTED:
        for path in site.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    modules = [path for path in site.rglob("*.cpython-*.so") if path.relative_to(site).parts[0] not in KEPT_WHOLE]
    run("/usr/bin/strip", "--strip-unneeded", *modules)
    bill = environment / "share/datasync/sbom.cdx.json"
    bill.parent.mkdir(parents=True)
    bill.write_text(sbom(site))


def run(command: str, *arguments: object) -> None:
    subprocess.run([Path(sys.executable).parent / command, *map(str, arguments)], check=True)


def sbom(site: Path) -> str:
    """What the image holds, as CycloneDX 1.6 JSON: Python packages and Debian packages."""
    bom = Bom()
    for distribution in distributions(path=[str(site)]):
        name, version = distribution.metadata["Name"], distribution.version
        bom.components.add(component(name, version, PackageURL("pypi", None, name.lower(), version)))
    for name, version in debian_packages():
        name = name.partition(":")[0]
        purl = PackageURL("deb", "debian", name, version, {"distro": "debian-12"})
        bom.components.add(component(name, version, purl))
    text: str = make_outputter(bom, OutputFormat.JSON, SchemaVersion.V1_6).output_as_string()
    return json.dumps(json.loads(text), indent=1)


def component(name: str, version: str, purl: PackageURL) -> Component:
    return Component(name=name, version=version, purl=purl, bom_ref=str(purl), type=ComponentType.LIBRARY)


def debian_packages() -> list[list[str]]:
    """Name and version of each, as the image's base recorded them before the build added its own."""
    return [line.split() for line in Path("/usr/share/datasync/debian-packages").read_text().splitlines()]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
