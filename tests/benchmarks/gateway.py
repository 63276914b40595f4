"""An authenticated GET through the gateway against the same GET on the service directly."""

from typing import Any

from pydantic import SecretStr

from libs.core.principal import Principal
from libs.runtime.principals import PRINCIPAL_HEADER, PrincipalSigner
from libs.runtime.suite import SuiteSettings, load_keys
from libs.testing.rest import rest
from libs.testing.suite import Suite
from tests.benchmarks.load import Load, get
from tests.e2e.replication import make_endpoint

CONNECTIONS = (1, 32)
ROUNDS = 3
ROUND_SECONDS = 3.0
CONFIG = {"host": "127.0.0.1", "port": 5432, "database": "d", "username": "u", "password": "p"}


async def run() -> list[dict[str, Any]]:
    """Requests a second and the 99th percentile of the latency, at each number of connections."""
    with Suite({"LOG_LEVEL": "WARNING"}) as suite:
        async with rest(suite.base_url, api_key=suite.api_key) as api:
            source = await make_endpoint(api, "sources", "postgres", CONFIG)
        path = f"/api/v1/project/123/sources/{source.id}"
        results = []
        for connections in CONNECTIONS:
            rounds = [await _round(suite, path, connections) for _ in range(ROUNDS)]
            ours, baseline = sorted(rounds, key=lambda pair: pair[0].per_second / pair[1].per_second)[ROUNDS // 2]
            results += _results(connections, ours, baseline)
        return results


async def _round(suite: Suite, path: str, connections: int) -> tuple[Load, Load]:
    """Through the gateway, and directly."""
    service = f"http://127.0.0.1:{suite.settings['catalog_port']}"
    ours = {"Authorization": f"Bearer {suite.api_key}"}
    through = await get(suite.base_url + path, ours, connections=connections, seconds=ROUND_SECONDS)
    # Signed anew: the token is good for 30 seconds.
    signed = {PRINCIPAL_HEADER: _token(suite)}
    return through, await get(service + path, signed, connections=connections, seconds=ROUND_SECONDS)


def _token(suite: Suite) -> str:
    """What the gateway would send along."""
    keys = load_keys(suite.directory, SuiteSettings.model_validate(suite.settings))
    signer = PrincipalSigner("gateway", SecretStr(keys.signing_keys["gateway"]))
    principal = Principal(kind="api_key", subject="bootstrap", name="bench", projects={123: "owner"}, scopes=("*",))
    return signer.sign(principal, "catalog")


def _results(connections: int, ours: Load, baseline: Load) -> list[dict[str, Any]]:
    case = f"{connections} connection{'s' if connections > 1 else ''}"
    return [
        {
            "benchmark": "gateway",
            "case": f"{case}, requests",
            "value": round(ours.per_second),
            "unit": "requests/s",
            "baseline": f"the service directly: {baseline.per_second:,.0f} requests/s",
            "ratio": round(ours.per_second / baseline.per_second, 2),
        },
        {
            "benchmark": "gateway",
            "case": f"{case}, p99",
            "value": round(ours.p99_ms, 2),
            "unit": "ms",
            "baseline": f"the service directly: {baseline.p99_ms:.2f} ms",
            "ratio": round(baseline.p99_ms / ours.p99_ms, 2),
        },
    ]
