"""Every way to ask for a channel without a right to it, on a running relay: not one event is delivered."""

import base64
import json
import time
from urllib.parse import quote

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from pages import Page
from relay import Relay, run
from servers import until

from tornado_relay import subscribe_token

SECRET, OTHER = "s" * 64, "o" * 64
RSA = rsa.generate_private_key(65537, 2048)
PUBLIC = (
    RSA.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode()
)
MINE, YOURS = "mine", "yours"
# Tokens are made when this file is read, and used when their turn comes.
DAY = 86_400


@pytest.fixture(scope="module")
def guarded(postgres_server, tmp_path_factory):
    """A relay with a secret and a public key, on PostgreSQL, where channels have twins."""
    home = tmp_path_factory.mktemp("guarded")
    environment = postgres_server.environment | {"RELAY_JWT_SECRET": SECRET, "RELAY_JWT_PUBLIC_KEY": PUBLIC}
    with Relay(home, "--workers", "2", "--log-level", "TRACE", **environment) as relay:
        yield relay


def token(*channels, key=SECRET, algorithm="HS256", **more):
    return jwt.encode({"channels": list(channels), "exp": time.time() + DAY} | more, key, algorithm)


def unsigned(algorithm):
    parts = {"alg": algorithm, "typ": "JWT"}, {"channels": [YOURS, "*"], "exp": time.time() + DAY}
    encoded = [base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode() for part in parts]
    return ".".join([*encoded, ""])


def by_public_key():
    hmac = jwt.algorithms.HMACAlgorithm(jwt.algorithms.HMACAlgorithm.SHA256)
    head = unsigned("HS256").rpartition(".")[0]
    return head + "." + base64.urlsafe_b64encode(hmac.sign(head.encode(), PUBLIC.encode())).rstrip(b"=").decode()


# Name: path, headers, status. Every one of them is after the channel "yours".
ATTEMPTS = {
    "nothing": (f"/channel={YOURS}", {}, 401),
    "nothing, short form": (f"/{YOURS}", {}, 401),
    "nothing, query form": (f"/events?channel={YOURS}", {}, 401),
    "another channel's": (f"/channel={YOURS}", {"Cookie": f"relay_token={token(MINE)}"}, 403),
    "another channel's, short form": (f"/{YOURS}", {"Cookie": f"relay_token={token(MINE)}"}, 403),
    "one of two": (f"/events?channel={MINE}&channel={YOURS}", {"Cookie": f"relay_token={token(MINE)}"}, 403),
    "one of two, first": (f"/events?channel={YOURS}&channel={MINE}", {"Cookie": f"relay_token={token(MINE)}"}, 403),
    "path and query": (f"/channel={YOURS}?channel={MINE}", {"Authorization": f"Bearer {token(MINE)}"}, 403),
    "encoded": (f"/channel=%79{YOURS[1:]}", {"Authorization": f"Bearer {token(MINE)}"}, 403),
    "encoded twice": (f"/channel=%2579{YOURS[1:]}", {"Authorization": f"Bearer {token(MINE)}"}, 403),
    "encoded form": (f"/channel%3D{YOURS}", {"Authorization": f"Bearer {token(MINE)}"}, 403),
    "other case": (f"/channel={YOURS.upper()}", {"Authorization": f"Bearer {token(YOURS.upper() + '2')}"}, 403),
    "star in the request": ("/channel=*", {"Authorization": f"Bearer {token(MINE)}"}, 403),
    "prefix in the request": ("/channel=your*", {"Authorization": f"Bearer {token(MINE)}"}, 403),
    "longer name": (f"/channel={YOURS}", {"Authorization": f"Bearer {token(YOURS + '2', YOURS + '2*')}"}, 403),
    "shorter name": (f"/channel={YOURS}", {"Authorization": f"Bearer {token(YOURS[:-1])}"}, 403),
    "no channels": (f"/channel={YOURS}", {"Authorization": f"Bearer {token()}"}, 403),
    "expired": (f"/channel={YOURS}", {"Authorization": f"Bearer {token(YOURS, exp=time.time() - 1)}"}, 401),
    "not yet valid": (f"/channel={YOURS}", {"Authorization": f"Bearer {token(YOURS, nbf=time.time() + DAY)}"}, 401),
    "without end": (f"/channel={YOURS}?token={jwt.encode({'channels': [YOURS]}, SECRET)}", {}, 401),
    "wrong key": (f"/channel={YOURS}?token={token(YOURS, key=OTHER)}", {}, 401),
    "alg none": (f"/channel={YOURS}?token={unsigned('none')}", {}, 401),
    "alg nOnE": (f"/channel={YOURS}?token={unsigned('nOnE')}", {}, 401),
    "public key as secret": (f"/channel={YOURS}?token={by_public_key()}", {}, 401),
    "not Bearer": (f"/channel={YOURS}", {"Authorization": f"Basic {token(YOURS)}"}, 401),
    "bad cookie, good query": (f"/channel={YOURS}?token={token(YOURS)}", {"Cookie": "relay_token=x"}, 401),
    "other cookie": (f"/channel={YOURS}", {"Cookie": f"token={token(YOURS)}"}, 401),
    "two tokens, none for it": (
        f"/events?channel={MINE}&channel={YOURS}&token={token(MINE)}&token={token('more')}",
        {},
        403,
    ),
    "two tokens, one of no key": (f"/channel={YOURS}?token={token(MINE)}&token={token(YOURS, key=OTHER)}", {}, 401),
    "two tokens, the right one expired": (
        f"/channel={YOURS}?token={token(YOURS, exp=time.time() - 1)}&token={token(MINE)}",
        {},
        401,
    ),
    "a token more beside the cookie": (
        f"/channel={YOURS}?token={token(YOURS)}",
        {"Cookie": f"relay_token={token(MINE)}"},
        403,
    ),
    "last id": (f"/channel={YOURS}?last_event_id=earliest", {"Last-Event-ID": "earliest"}, 401),
}


@pytest.mark.parametrize("name", ATTEMPTS)
def test_no_event_without_a_right_to_it(guarded, postgres_server, pages, name):
    """While the stream that has the right gets the event."""
    path, headers, status = ATTEMPTS[name]
    (rightful,) = pages.open(guarded.port, [f"/channel={YOURS}"], {"Authorization": f"Bearer {token(YOURS)}"})
    (attempt,) = pages.open(guarded.port, [path], headers)
    (head,) = pages.open(guarded.port, [path], headers, method="HEAD")
    postgres_server.publish(YOURS, "for you only")
    pages.until(lambda: rightful.events, "the event")
    assert attempt.status == status
    assert head.status == status
    assert b"for you only" not in attempt.body
    assert rightful.data == ["for you only"]
    assert ("www-authenticate" in attempt.headers) == (status == 401)


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        (f"/channel={MINE}", {"Cookie": f"a=b; relay_token={token(MINE)}"}),
        (f"/{MINE}", {"Authorization": f"bearer {token('mi*')}"}),
        (f"/events?channel={MINE}&token={token('*')}&channel=other", {}),
        (f"/events?channel={MINE}&channel=b&token={token('b')}&token={token(MINE)}&token={token('c')}", {}),
        (f"/channel={MINE}", {"Authorization": f"Bearer {token(MINE, key=RSA, algorithm='RS256')}"}),
        (f"/channel={MINE}", {"Cookie": f"relay_token={token(MINE)}", "Authorization": "Bearer x"}),
    ],
)
def test_who_has_a_right_is_let_in(guarded, postgres_server, pages, path, headers):
    """By cookie, Bearer, or query, in this order; exact, by a prefix, or for all; by either key; by several tokens together."""
    (page,) = pages.open(guarded.port, [path], headers)
    postgres_server.publish(MINE, "hello")
    pages.until(lambda: page.events, "the event")
    assert page.data == ["hello"]


def test_twin_is_heard_only_with_a_right_to_it(guarded, postgres_server, pages):
    """NOTIFY Orders arrives as orders, which is a channel of its own."""
    opened = [
        pages.open(guarded.port, ["/channel=Orders"], {"Authorization": f"Bearer {token(*granted)}"})[0]
        for granted in (["Orders"], ["Orders", "orders"])
    ]
    postgres_server.execute("NOTIFY Orders, 'twin'")
    postgres_server.publish("Orders", "exact")
    pages.until(lambda: all(page.data[-1:] == ["exact"] for page in opened), "the last event")
    assert [page.data for page in opened] == [["exact"], ["twin", "exact"]]


def test_stream_ends_with_its_token(guarded, pages):
    """With a time after which the page comes back, by then with another token."""
    (page,) = pages.open(guarded.port, [f"/channel={MINE}?token={token(MINE, exp=time.time() + 2)}"])
    begin = time.time()
    pages.until(lambda: page.closed, "its end", 6)
    assert time.time() - begin > 1
    assert page.parser.retry is not None
    (again,) = pages.open(guarded.port, [page.path])
    assert again.status == 401


def test_stream_of_several_tokens_ends_with_the_first_of_them(guarded, pages):
    """From then on not all that it delivers is covered."""
    query = f"token={token(MINE)}&token={token(YOURS, exp=time.time() + 2)}&token={token('more')}"
    (page,) = pages.open(guarded.port, [f"/events?channel={MINE}&channel={YOURS}&{query}"])
    pages.until(lambda: page.closed, "its end", 6)
    assert page.status == 200


def test_tokens_are_in_no_log(guarded, pages):
    """At the finest level, for what is let in, refused, and cannot be parsed."""
    secret_parts = []
    for path in ("/channel=mine?token=", "/events?channel=%FF&token=", "/channel=%00?token=", "/nothing/here?token="):
        for value in (token(MINE), token(YOURS, key=OTHER)):
            secret_parts.append(value)
            pages.open(guarded.port, [path + value], {"Cookie": f"relay_token={value}"})
            pages.add(Page(guarded.port, path + value, {"Authorization": f"Bearer {value}"}, method="BREW"))
    pages.read(0.5)
    until(lambda: "BREW" in guarded.log or "405" in guarded.log, "the last is logged")
    assert not [part for part in secret_parts if part in guarded.log or part.split(".")[2] in guarded.log]
    assert SECRET not in guarded.log
    assert "Traceback" not in guarded.log


def test_rotation(redis_server, tmp_path, pages):
    """Tokens of the old key count while it is there as the previous one, and no longer; open streams stay."""
    environment = tmp_path / ".env"
    environment.write_text(f"RELAY_JWT_SECRET={OTHER}\n")
    old = subscribe_token(MINE, key=OTHER)
    with Relay(tmp_path, "--workers", "1", **redis_server.environment) as relay:

        def reload(text, times):
            environment.write_text(text)
            relay.signal(1)
            until(lambda: relay.log.count(" reloaded") == times, "reloaded")

        def status(with_token):
            return pages.open(relay.port, [f"/channel={MINE}?token={with_token}"])[0].status

        assert (status(old), status(subscribe_token(MINE, key=SECRET))) == (200, 401)
        reload(f"RELAY_JWT_SECRET={SECRET}\nRELAY_JWT_SECRET_PREVIOUS={OTHER}\n", 1)
        assert (status(old), status(subscribe_token(MINE, key=SECRET))) == (200, 200)
        reload(f"RELAY_JWT_SECRET={SECRET}\n", 2)
        assert (status(old), status(subscribe_token(MINE, key=SECRET))) == (401, 200)


def test_token_command(guarded, tmp_path, pages):
    """What it prints lets a stream in; without a secret it says what to set."""
    done = run("token", MINE, "user-*", "--ttl", "60", cwd=tmp_path, RELAY_JWT_SECRET=SECRET)
    assert done.returncode == 0
    (page,) = pages.open(guarded.port, [f"/events?channel={MINE}&channel=user-7&token={quote(done.stdout.strip())}"])
    assert page.status == 200
    key = RSA.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (tmp_path / "private.pem").write_bytes(key)
    done = run("token", MINE, "--private-key", "private.pem", cwd=tmp_path)
    (page,) = pages.open(guarded.port, [f"/channel={MINE}?token={done.stdout.strip()}"])
    assert page.status == 200
    for arguments, text in (
        ((MINE,), "RELAY_JWT_SECRET is not set"),
        ((MINE, "--ttl", "0"), "not a number of seconds"),
        ((MINE, "--private-key", "nowhere.pem"), "nowhere.pem cannot be read"),
        (("",), "channel is empty"),
    ):
        done = run("token", *arguments, cwd=tmp_path, **({"RELAY_JWT_SECRET": SECRET} if arguments == ("",) else {}))
        assert done.returncode != 0
        assert text in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("variables", "text"),
    [
        ({"RELAY_JWT_PUBLIC_KEY": "nowhere.pem"}, "RELAY_JWT_PUBLIC_KEY: 'nowhere.pem' is neither a PEM text"),
        ({"RELAY_JWT_PUBLIC_KEY": "-----BEGIN PUBLIC KEY-----"}, "cannot be read as a public key"),
        ({"RELAY_JWT_SECRET": PUBLIC}, "holds a PEM key, not a secret"),
        ({"RELAY_JWT_REQUIRE_EXP": "maybe"}, "is not a boolean"),
    ],
)
def test_relay_does_not_start_with_a_key_that_cannot_be_used(redis_server, tmp_path, variables, text):
    """It must not be open by mistake."""
    done = run("--port", "0", cwd=tmp_path, **redis_server.environment, **variables)
    assert done.returncode == 2
    assert text in done.stderr


def test_key_may_be_a_file_or_one_line(redis_server, tmp_path, pages):
    r"""A path, or PEM with its line ends as \n, as in an environment file."""
    (tmp_path / "public.pem").write_text(PUBLIC)
    for value in ("public.pem", PUBLIC.replace("\n", "\\n")):
        with Relay(tmp_path, "--workers", "1", **redis_server.environment, RELAY_JWT_PUBLIC_KEY=value) as relay:
            signed = token(MINE, key=RSA, algorithm="RS256")
            (page,) = pages.open(relay.port, [f"/channel={MINE}?token={signed}"])
            assert page.status == 200
            assert "no authentication" not in relay.log
