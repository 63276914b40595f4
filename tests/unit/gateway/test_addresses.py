"""Which address a request comes from, and whose ``X-Forwarded-For`` is used."""

import pytest
from pydantic import SecretStr

from libs.process.signing_keys import new_signing_key
from services.gateway.addresses import ClientAddresses
from services.gateway.config import GatewaySettings


def _addresses(trusted_proxies: str = "") -> ClientAddresses:
    settings = GatewaySettings.model_validate(
        {"signing_key": SecretStr(new_signing_key()[0]), "trusted_proxies": trusted_proxies}
    )
    return ClientAddresses(settings.trusted_proxies)


@pytest.mark.parametrize(
    ("remote", "forwarded_for", "client"),
    [
        ("10.0.0.1", ["203.0.113.9:41234"], "203.0.113.9"),
        ("10.0.0.1", ["[2001:db9::7]:41234"], "2001:db9::7"),
        ("10.0.0.1", ["[2001:db9::7]"], "2001:db9::7"),
        ("10.0.0.1", ["2001:db9::7"], "2001:db9::7"),
        ("10.0.0.1", ["fe80::1%eth0"], "fe80::1"),
        ("10.0.0.1", ["203.0.113.9, , 10.0.0.2:80,"], "203.0.113.9"),
        ("10.0.0.1", ["203.0.113.9", "10.0.0.2"], "203.0.113.9"),
        ("10.0.0.1", ["_hidden-7"], "_hidden-7"),
        ("10.0.0.1", ["203.0.113.9, unknown"], "10.0.0.1"),
        ("10.0.0.1", ["203.0.113.9:1:2"], "10.0.0.1"),
        ("10.0.0.1", ["203.0.113.٩"], "10.0.0.1"),
        ("10.0.0.1", ["\udcff"], "10.0.0.1"),
        ("192.0.2.1", ["203.0.113.9:41234"], "192.0.2.1"),
        ("10.0.0.1", [], "10.0.0.1"),
        ("10.0.0.1", ["198.51.100.7"], "198.51.100.7"),
        ("10.0.0.1", ["203.0.113.5, 198.51.100.7"], "198.51.100.7"),
        ("10.0.0.1", ["203.0.113.5", "198.51.100.7, 10.0.0.2"], "198.51.100.7"),
        ("10.0.0.1", ["nonsense"], "10.0.0.1"),
        ("10.0.0.1", ["10.0.0.3,10.0.0.2"], "10.0.0.3"),
        ("198.51.100.7", ["203.0.113.5"], "198.51.100.7"),
        ("2001:db8::1", ["203.0.113.5"], "203.0.113.5"),
        ("::ffff:10.0.0.1", ["203.0.113.5"], "203.0.113.5"),
        (None, ["203.0.113.5"], "unknown"),
    ],
)
def test_the_nearest_address_that_is_not_a_trusted_proxy_is_the_client(
    remote: str | None, forwarded_for: list[str], client: str
) -> None:
    assert _addresses("10.0.0.0/8, 2001:db8::/32").of(remote, forwarded_for) == client


def test_no_proxy_is_trusted_by_default() -> None:
    assert _addresses().of("10.0.0.1", ["198.51.100.7"]) == "10.0.0.1"
