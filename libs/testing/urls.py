"""Where a service under test finds the others."""

from typing import Any

from libs.contracts.services import service_named


def url_settings(**urls: str) -> dict[str, Any]:
    """``auth=URL`` and so on as settings of a service, to be passed by ``**``; the others keep their defaults."""
    return {service_named(name).url_setting: url for name, url in urls.items()}
