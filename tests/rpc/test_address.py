import pytest

from rpc.address import is_loopback, joined


@pytest.mark.parametrize(
    ("host", "address"),
    [("localhost", "localhost:80"), ("127.0.0.1", "127.0.0.1:80"), ("::1", "[::1]:80"), ("::", "[::]:80")],
)
def test_ipv6_is_bracketed_when_joined(host: str, address: str) -> None:
    assert joined(host, 80) == address


@pytest.mark.parametrize(
    "address",
    ["localhost", "LocalHost:50051", "127.0.0.1", "127.0.0.1:50051", "127.8.9.1:1", "::1", "[::1]", "[::1]:50051"],
)
def test_address_is_loopback_when_it_names_this_machine(address: str) -> None:
    assert is_loopback(address)


@pytest.mark.parametrize(
    "address",
    [
        "",
        "triton:8001",
        "10.0.0.1:8001",
        "0.0.0.0:8001",
        "[::]:8001",
        "[2001:db8::1]:8001",
        "localhost.example.org:80",
        "127.0.0.1.example.org:80",
        "dns:///localhost:50051",
        "ipv4:127.0.0.1:50051",
        "unix:/run/localhost",
    ],
)
def test_address_is_not_loopback_when_it_may_be_elsewhere(address: str) -> None:
    assert not is_loopback(address)
