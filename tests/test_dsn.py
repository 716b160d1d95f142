"""The connection string: several servers, and what is shown of it."""

import pytest
from psycopg2.extensions import parse_dsn

from tornado_relay import SettingsError
from tornado_relay.brokers.postgres.dsn import addresses, complete, shown

PAIR = "postgresql://u:secret@192.0.2.1,192.0.2.2:5433/d"


def test_every_server_is_an_address_of_its_own():
    """A silent one must not use up the time of the next, so libpq is given one at a time; ports may be left out."""
    tried = [parse_dsn(dsn) for dsn in addresses(complete(PAIR, "x"))]
    assert [(dsn["host"], dsn["hostaddr"], dsn.get("port") or "5432") for dsn in tried] == [
        ("192.0.2.1", "192.0.2.1", "5432"),
        ("192.0.2.2", "192.0.2.2", "5433"),
    ]
    given = "host=one,two hostaddr=192.0.2.1,192.0.2.2 port=1 dbname=d"
    tried = [parse_dsn(dsn) for dsn in addresses(given)]
    assert [(dsn["host"], dsn["hostaddr"], dsn["port"]) for dsn in tried] == [
        ("one", "192.0.2.1", "1"),
        ("two", "192.0.2.2", "1"),
    ]


@pytest.mark.parametrize(
    ("url", "wanted"),
    [
        (PAIR, "read-write"),
        (f"{PAIR}?target_session_attrs=primary", "primary"),
        ("postgresql://u@/d?hostaddr=192.0.2.1,192.0.2.2", "read-write"),
        ("postgresql://u@192.0.2.1/d", None),
    ],
)
def test_of_several_servers_the_one_that_takes_writes_is_meant(url, wanted):
    """Unless the URL says otherwise; one server alone is taken as it is."""
    assert parse_dsn(complete(url, "x")).get("target_session_attrs") == wanted


@pytest.mark.parametrize(
    ("url", "text"),
    [
        (PAIR, "u@192.0.2.1:5432,192.0.2.2:5433/d"),
        ("postgresql://u:secret@a,b/d?target_session_attrs=read-write", "u@a:5432,b:5432/d"),
        ("postgresql://u@a:1/d", "u@a:1/d"),
        ("postgresql:///d?host=a,b&port=7", "@a:7,b:7/d"),
    ],
)
def test_each_server_is_shown_with_its_port(url, text):
    """And no password."""
    assert shown(url) == text


@pytest.mark.parametrize(
    "url", ["postgresql://u:secret@/d?host=a,b&port=1,2,3", "postgresql://u:secret@a/d?hostaddr=192.0.2.1,192.0.2.2"]
)
def test_ports_and_addresses_that_do_not_match_the_hosts(url):
    """The error says what would be right, and shows nothing of the URL."""
    with pytest.raises(SettingsError, match="as many ports or addresses as hosts; give one port for all") as caught:
        complete(url, "x")
    assert "secret" not in str(caught.value)
