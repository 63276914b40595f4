"""The types of settings: how a value is written in an environment variable or in ``datasync.yaml``."""

import ipaddress
import json
import re
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_settings import NoDecode
from pymongo.errors import PyMongoError
from pymongo.uri_parser import parse_uri

MONGODB_SCHEMES = ("mongodb://", "mongodb+srv://")

_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)")
_SECONDS_PER_UNIT = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}
_HOST_NAME = re.compile(r"(?=.{1,253}\Z)[A-Za-z0-9_](?:[A-Za-z0-9_-]*[A-Za-z0-9_])?(?:\.[A-Za-z0-9_-]+)*")


def seconds_of(value: Any) -> Any:
    """``30``, ``"30"``, ``"30s"`` or ``"1m30s"`` in seconds; anything else is left for the field to reject."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    if re.fullmatch(rf"(?:{_DURATION.pattern}\s*)+", text):
        return sum(float(number) * _SECONDS_PER_UNIT[unit] for number, unit in _DURATION.findall(text))
    return text


def listed(value: Any) -> Any:
    """A list, written as JSON or as items separated by commas."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("["):
        return json.loads(value)
    return [item.strip() for item in value.split(",") if item.strip()]


def is_port_in_range(url: str) -> bool:
    """Whether a URL names no port, or a valid one."""
    try:
        return urlsplit(url).port != 0
    except ValueError:
        return False


def _with_a_port(url: str) -> str:
    if not is_port_in_range(url):
        raise ValueError("the port must be a number from 1 to 65535")
    return url


def _from_json(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        raise ValueError("is not valid JSON") from None


def _listening_host(host: str) -> str:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        if _HOST_NAME.fullmatch(host) is None or host.rpartition(".")[2].isdecimal():
            raise ValueError("must be an address such as 0.0.0.0, or a name, without a scheme and a port") from None
    return host


def _kafka_servers(servers: str) -> str:
    for server in servers.split(","):
        _with_a_port(f"kafka://{server.strip()}")
    return servers


def _mongodb_url(url: str) -> str:
    if not url.startswith(MONGODB_SCHEMES):
        raise ValueError("must begin with mongodb:// or mongodb+srv://")
    # SRV records are resolved when the store is first used.
    if url.startswith("mongodb://"):
        try:
            parse_uri(url, warn=True)
        except (PyMongoError, ValueError):
            raise ValueError(
                "is not a valid connection string (percent-encode special characters in the user name and password)"
            ) from None
    return url


def _log_level(value: Any) -> str:
    name = str(value).upper()
    return "WARN" if name == "WARNING" else name


T = TypeVar("T")
FromJson = Annotated[T, NoDecode, BeforeValidator(_from_json)]
"""Written as JSON."""

Seconds = Annotated[float, BeforeValidator(seconds_of), Field(ge=0)]
"""A duration in seconds; may be written with a unit."""

Port = Annotated[int, Field(ge=0, le=65535)]
"""A port to listen on; 0 takes a free one."""

Host = Annotated[str, AfterValidator(_listening_host)]
"""An address or a name to listen on."""


def _service_urls(text: str) -> str:
    urls = [_with_a_port(url.strip().rstrip("/")) for url in text.split(",")]
    if len({url.partition("://")[0] for url in urls}) > 1:
        raise ValueError("must be all http or all https")
    return ",".join(urls)


_SERVICE_URL = r"https?://[^\s,/?#]+/?"
ServiceUrls = Annotated[
    str,
    Field(pattern=rf"^{_SERVICE_URL}(\s*,\s*{_SERVICE_URL})*$"),
    AfterValidator(_service_urls),
]
"""One or several URLs of one service, separated by commas, without paths."""
HttpUrl = Annotated[str, Field(pattern=r"^https?://[^\s/?#]+(/[^\s?#]*)?$"), AfterValidator(_with_a_port)]
KafkaServers = Annotated[str, Field(pattern=r"^[^\s,]+:\d+(\s*,\s*[^\s,]+:\d+)*$"), AfterValidator(_kafka_servers)]
MongodbUrl = Annotated[str, AfterValidator(_mongodb_url)]
Descriptor = Annotated[int, Field(ge=3)]
LogLevel = Annotated[Literal["DEBUG", "INFO", "WARN", "ERROR"], BeforeValidator(_log_level)]
