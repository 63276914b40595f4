"""Writes what the deployment files take from the table of services: ``python -m deploy.tables``."""

from pathlib import Path

import yaml

from libs.contracts.services import SERVICES, Service

CHART_TABLE = Path(__file__).parents[1] / "helm/datasync/files/services.yaml"
HEADER = "# Written by `make docs` from libs/contracts/services.py.\n"


def chart_table() -> str:
    """The services as the chart's templates read them."""
    return HEADER + yaml.safe_dump({"services": [_row(service) for service in SERVICES]}, sort_keys=False)


def _row(service: Service) -> dict[str, object]:
    return {
        "name": service.name,
        "kubernetesName": service.name.replace("_", "-"),
        "port": service.port,
        "urlSetting": service.url_setting.upper() if service.callers else None,
        "isPublic": service.is_public,
        "isForwardedTo": service.is_forwarded_to,
        "usesMongodb": service.has_store or service.is_public,
        "usesKafka": service.uses_event_log,
        "secrets": [secret.upper() for secret in service.secrets],
        "calls": sorted(service.calls | _forwards_to(service)),
        "callers": sorted(service.callers),
    }


def _forwards_to(service: Service) -> set[str]:
    return {other.name for other in SERVICES if other.is_forwarded_to} if service.is_public else set()


if __name__ == "__main__":
    CHART_TABLE.write_text(chart_table())
