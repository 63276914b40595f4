"""Which addresses that a person gives may be called, and what counts as one client."""

import ipaddress

import pytest

from libs.core.addresses import one_client, outbound_fault


@pytest.mark.parametrize(
    "url",
    [
        "https://hooks.example.com/alerts?x=1",
        "http://93.184.216.34:8080/",
        "https://[2606:2800:220:1:248:1893:25c8:1946]/",
        "https://example.com",
    ],
)
def test_public_addresses_and_names_are_accepted(url: str) -> None:
    assert outbound_fault(url) is None


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "127.1",
        "2130706433",
        "0x7f000001",
        "0177.0.0.1",
        "localhost",
        "LOCALHOST",
        "api.localhost",
        "10.0.0.5",
        "192.168.1.1",
        "169.254.169.254",
        "100.100.100.200",
        "0.0.0.0",
        "224.0.0.1",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "[64:ff9b::a9fe:a9fe]",
        "[2002:a9fe:a9fe::]",
        "[fd00:ec2::254]",
        "[fe80::1]",
    ],
)
def test_private_addresses_are_refused_however_they_are_written(host: str) -> None:
    fault = outbound_fault(f"https://{host}/hook")
    assert fault is not None
    assert "OUTBOUND_ALLOWED_NETWORKS" in fault


@pytest.mark.parametrize(
    "url", ["ftp://example.com", "nonsense", "https://", "https://a b/", "https://[::1", "http://x:99999/"]
)
def test_what_is_no_web_address_is_refused(url: str) -> None:
    assert outbound_fault(url) == "must be an http or https address"


def test_credentials_are_refused() -> None:
    assert outbound_fault("https://user:secret@example.com/") == "must be without credentials"


def test_networks_that_are_allowed_may_be_called() -> None:
    allowed = [ipaddress.ip_network("10.0.0.0/8"), ipaddress.ip_network("::1/128")]
    assert outbound_fault("http://10.1.2.3/", allowed) is None
    assert outbound_fault("http://[::1]/", allowed) is None
    assert outbound_fault("http://192.168.1.1/", allowed) is not None


def test_an_ipv6_host_is_its_network_and_an_ipv4_host_itself() -> None:
    assert one_client("2001:db8:1:2:3:4:5:6") == one_client("2001:db8:1:2::1") == "2001:db8:1:2::/64"
    assert one_client("2001:db8:1:3::1") != one_client("2001:db8:1:2::1")
    assert one_client("203.0.113.7") == one_client("::ffff:203.0.113.7") == "203.0.113.7"
    assert one_client("fe80::1%eth0") == "fe80::/64"


def test_a_name_that_a_proxy_gave_is_a_client_and_any_other_text_is_nobody() -> None:
    assert one_client("_hidden-7") == "_hidden-7"
    assert one_client("no address") == one_client("") == one_client("_a b") == "unknown"
