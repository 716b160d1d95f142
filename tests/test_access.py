import pytest

from tornado_relay.access import Origins, Proxies
from tornado_relay.values import proxies

ALLOWED = ["https://shop.example", "http://localhost:8000"]


@pytest.mark.parametrize("origin", [*ALLOWED, None])
def test_listed_pages_and_clients_that_are_no_page_are_admitted(origin):
    """A request without Origin comes from no other page."""
    assert Origins(ALLOWED).admits(origin)


@pytest.mark.parametrize(
    "origin",
    ["http://shop.example", "https://shop.example:444", "https://SHOP.example.evil", "https://shop.example.evil.example", "null", ""],
)  # fmt: skip
def test_other_pages_are_not_admitted(origin):
    """Scheme, host and port must all match, and "null" is nobody."""
    assert not Origins(ALLOWED).admits(origin)


@pytest.mark.parametrize("allowed", [[], ["*"]])
def test_open_relay_admits_every_page_without_credentials(allowed):
    """A browser takes no wildcard together with credentials, so none are offered."""
    origins = Origins(allowed)
    assert origins.admits("https://anything.example")
    assert not origins.admits("null")
    assert origins.headers("https://anything.example") == {"Access-Control-Allow-Origin": "*"}


def test_listed_page_gets_its_own_origin_and_credentials():
    """And caches are told that the answer depends on it."""
    assert Origins(ALLOWED).headers("https://shop.example") == {
        "Access-Control-Allow-Origin": "https://shop.example",
        "Access-Control-Allow-Credentials": "true",
        "Vary": "Origin",
    }
    assert Origins(ALLOWED).headers(None) == {"Vary": "Origin"}


@pytest.mark.parametrize(
    ("trusted", "peer", "forwarded_for", "client"),
    [
        ("", "10.0.0.1", ["1.1.1.1"], "10.0.0.1"),
        ("10.0.0.1", "10.0.0.1", ["1.1.1.1"], "1.1.1.1"),
        ("10.0.0.1", "10.0.0.2", ["1.1.1.1"], "10.0.0.2"),
        ("10.0.0.1", "10.0.0.1", [], "10.0.0.1"),
        ("10.0.0.1", "10.0.0.1", ["6.6.6.6, 1.1.1.1"], "1.1.1.1"),
        ("10.0.0.0/8", "10.0.0.1", ["6.6.6.6, 1.1.1.1, 10.0.0.9"], "1.1.1.1"),
        ("10.0.0.0/8", "10.0.0.1", ["6.6.6.6", "1.1.1.1", "10.0.0.9"], "1.1.1.1"),
        ("10.0.0.0/8", "10.0.0.1", ["10.0.0.7"], "10.0.0.7"),
        ("10.0.0.1", "10.0.0.1", ["1.1.1.1, nonsense"], "10.0.0.1"),
        ("10.0.0.1", "10.0.0.1", [""], "10.0.0.1"),
        ("10.0.0.1", "10.0.0.1", ["1.1.1.1,"], "10.0.0.1"),
        ("10.0.0.1", "::ffff:10.0.0.1", ["::ffff:1.1.1.1"], "1.1.1.1"),
        ("::1", "::1", ["[2001:DB8::1]"], "2001:db8::1"),
        ("unix", "unix", ["1.1.1.1"], "1.1.1.1"),
        ("127.0.0.1", "unix", ["1.1.1.1"], "unix"),
        ("unix", "unix", [], "unix"),
        ("unix", "127.0.0.1", ["1.1.1.1"], "127.0.0.1"),
    ],
)
def test_client_behind_proxies(trusted, peer, forwarded_for, client):
    """The last address that a trusted proxy wrote; what a client wrote itself counts for nothing."""
    assert Proxies(proxies(trusted)).client(peer, forwarded_for) == client
