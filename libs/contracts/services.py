"""The table of services: what each is called, where it listens and what it needs.

Settings, the suite, the gateway's routes and the deployment files read it, so a new service joins with one row.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from libs.contracts.internal import CALLS

Secret = Literal["api_key", "encryption_keys"]

GATEWAY = "gateway"


@dataclass(frozen=True, slots=True)
class Service:
    """One service.

    Args:
        port: where it listens by default.
        owns: what it is responsible for, in words.
        stop_stage: services stop in ascending order of their stages; those of one stage stop together.
        is_public: whether it listens for other machines; everything else is internal.
        is_forwarded_to: whether the gateway forwards callers' requests to it.
        has_store: whether it has an event store, in a MongoDB database of its own.
        uses_event_log: whether it publishes on the event log or follows it.
        secrets: the settings with secrets that no other service is given, besides the signing key that each has.
    """

    name: str
    port: int
    owns: str
    stop_stage: int
    is_public: bool = False
    is_forwarded_to: bool = False
    has_store: bool = False
    uses_event_log: bool = True
    secrets: tuple[Secret, ...] = ()

    @property
    def port_setting(self) -> str:
        """The suite's setting for its port; the gateway's is the installation's."""
        return "port" if self.name == GATEWAY else f"{self.name}_port"

    @property
    def url_setting(self) -> str:
        """Every service's setting for where this one is called."""
        return f"{self.name}_url"

    @property
    def default_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def calls(self) -> frozenset[str]:
        """The services that it makes internal calls to, for which it needs a signing key."""
        return frozenset(call.service for call in CALLS if self.name in call.callers)

    @property
    def callers(self) -> frozenset[str]:
        """The services whose requests it accepts, for which it needs their public keys."""
        internal = {caller for call in CALLS if call.service == self.name for caller in call.callers}
        return frozenset(internal | ({GATEWAY} if self.is_forwarded_to else set()))


# The gateway stops first, so that no new requests arrive. The worker follows: it gives its runs back to the
# orchestrator, which therefore must still listen.
SERVICES = (
    Service(
        "auth",
        8081,
        "users, projects, API keys, OAuth clients (sessions, tokens and login throttling are plain documents)",
        stop_stage=3,
        is_forwarded_to=True,
        has_store=True,
        secrets=("api_key",),
    ),
    Service(
        "catalog",
        8082,
        "sources, destinations; specs, connection tests, stream discovery",
        stop_stage=3,
        is_forwarded_to=True,
        has_store=True,
        secrets=("encryption_keys",),
    ),
    Service(
        "record_sync",
        8084,
        "developer sync records, their counted lists and change feed",
        stop_stage=3,
        is_forwarded_to=True,
        has_store=True,
    ),
    Service(
        "job_orchestrator",
        8083,
        "jobs, runs (progress, logs and leases are plain documents)",
        stop_stage=2,
        is_forwarded_to=True,
        has_store=True,
    ),
    Service(
        "worker",
        8086,
        "nothing: the data plane; claims runs, moves rows, tests connections, discovers streams",
        stop_stage=1,
    ),
    Service(
        GATEWAY,
        8080,
        "nothing: resolves credentials, forwards with a signed principal",
        stop_stage=0,
        is_public=True,
        uses_event_log=False,
    ),
)
"""Every service, in the order in which the suite starts them."""


def called(services: Iterable[Service]) -> tuple[Service, ...]:
    """Those that any other service sends requests to."""
    return tuple(service for service in services if service.callers)


def names_forwarded_to(services: Iterable[Service]) -> frozenset[str]:
    """Those that the gateway forwards callers' requests to, by name."""
    return frozenset(service.name for service in services if service.is_forwarded_to)


def service_named(name: str) -> Service:
    """The row of a service.

    Raises:
        KeyError: there is no such service.
    """
    return _BY_NAME[name]


_BY_NAME = {service.name: service for service in SERVICES}
