"""Tokens, as plain functions: which let whom in, and what is said of those that let nobody."""

import base64
import json
import time

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa

from tornado_relay import subscribe_token
from tornado_relay.errors import ChannelError, SettingsError, TokenError
from tornado_relay.tokens import Keys

SECRET, OTHER = "s" * 64, "o" * 64
# Tokens are made when this file is read, and used when their turn comes.
DAY = 86_400
RSA = rsa.generate_private_key(65537, 2048)
PRIVATE = {
    "RS256": RSA,
    "PS512": RSA,
    "ES256": ec.generate_private_key(ec.SECP256R1()),
    "ES384": ec.generate_private_key(ec.SECP384R1()),
    "ES512": ec.generate_private_key(ec.SECP521R1()),
    "EdDSA": ed25519.Ed25519PrivateKey.generate(),
    "EdDSA 448": ed448.Ed448PrivateKey.generate(),
}


def public(key):
    return key.public_key().public_bytes(*PEM_PUBLIC).decode()


def private(key):
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()


PEM_PUBLIC = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo


def claims(**more):
    return {"channels": ["a"], "exp": time.time() + DAY} | more


def test_subscribe_token_is_what_the_relay_takes():
    """A name or many, exact or with a star, and its end."""
    grant = Keys([SECRET], []).grant(subscribe_token(["orders", "user-7-*"], ttl=60, key=SECRET))
    allowed = ("orders", "user-7-", "user-7-x", "order", "orders2", "user-7", "user-8-x", "*", "user-7*")
    assert [name for name in allowed if grant.allows(name)] == ["orders", "user-7-", "user-7-x"]
    assert 55 < grant.expires_at - time.time() <= 60
    single = Keys([SECRET], []).grant(subscribe_token("orders", key=SECRET))
    assert single.allows("orders")
    assert not single.allows("o")
    assert Keys([SECRET], []).grant(subscribe_token("*", key=SECRET)).allows("anything")


def test_subscribe_token_reads_the_secret(monkeypatch, tmp_path):
    """From the environment, as the relay does; without one it says what to set."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RELAY_JWT_SECRET", raising=False)
    with pytest.raises(SettingsError, match="RELAY_JWT_SECRET is not set"):
        subscribe_token("a")
    monkeypatch.setenv("RELAY_JWT_SECRET", SECRET)
    assert Keys([SECRET], []).grant(subscribe_token("a")).allows("a")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (([],), ValueError),
        (("",), ChannelError),
        ((["a\n"],), ChannelError),
        (("a", 0), ValueError),
        (("a", float("nan")), ValueError),
    ],
)
def test_subscribe_token_refuses_what_makes_no_token(arguments, error):
    """Rather than one that lets nobody in."""
    with pytest.raises(error):
        subscribe_token(*arguments, key=SECRET)


@pytest.mark.parametrize("algorithm", ["HS256", "HS384", "HS512"])
def test_secret_is_for_all_hmac(algorithm):
    """SHA-2 of each length."""
    assert Keys([SECRET], []).grant(jwt.encode(claims(), SECRET, algorithm)).allows("a")


@pytest.mark.parametrize("name", PRIVATE)
def test_public_keys_of_each_kind(name):
    """A token of any JWT library, and of ours with the private key."""
    key = PRIVATE[name]
    keys = Keys([], [public(key)])
    assert keys.grant(jwt.encode(claims(), key, name.split()[0])).allows("a")
    assert keys.grant(subscribe_token("a", key=private(key))).allows("a")


def test_two_keys_for_rotation():
    """Both count, whichever is of which kind; when the old one is gone its tokens let nobody in."""
    old, new = jwt.encode(claims(), OTHER), jwt.encode(claims(), SECRET)
    signed = jwt.encode(claims(), RSA, "RS256")
    keys = Keys([SECRET, OTHER], [public(PRIVATE["ES256"]), public(RSA)])
    assert all(keys.grant(token).allows("a") for token in (old, new, signed))
    with pytest.raises(TokenError, match="of no key"):
        Keys([SECRET], []).grant(old)


def forged(header, payload, signature=b""):
    parts = [json.dumps(header).encode(), json.dumps(payload).encode(), signature]
    return ".".join(base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in parts)


def signed_with_public_key():
    """What takes a public key, which everybody has, for a secret (RFC 8725, section 2.1)."""
    hmac = jwt.algorithms.HMACAlgorithm(jwt.algorithms.HMACAlgorithm.SHA256)
    head, payload, _ = forged({"alg": "HS256", "typ": "JWT"}, claims()).split(".")
    signature = hmac.sign(f"{head}.{payload}".encode(), public(RSA).encode())
    return f"{head}.{payload}." + base64.urlsafe_b64encode(signature).rstrip(b"=").decode()


BAD = {
    "no token": ("x", "cannot be read"),
    "empty parts": ("..", "cannot be read"),
    "not ASCII": ("ü.ü.ü", "cannot be read"),
    "alg none": (forged({"alg": "none"}, claims()), "of no key"),
    "alg None": (forged({"alg": "None"}, claims()), "of no key|cannot be read"),
    "no alg": (forged({"typ": "JWT"}, claims()), "cannot be read|of no key"),
    "other secret": (jwt.encode(claims(), OTHER), "of no key"),
    "other private key": (jwt.encode(claims(), rsa.generate_private_key(65537, 2048), "RS256"), "of no key"),
    "public key as secret": (signed_with_public_key(), "of no key"),
    "expired": (jwt.encode(claims(exp=time.time() - 1), SECRET), "has expired"),
    "not yet valid": (jwt.encode(claims(nbf=time.time() + DAY), SECRET), "not valid yet"),
    "without end": (jwt.encode({"channels": ["a"]}, SECRET), "no claim 'exp'"),
    "without channels": (jwt.encode({"exp": time.time() + DAY}, SECRET), "no claim 'channels'"),
    "one name": (jwt.encode(claims(channels="a"), SECRET), "not a list of names"),
    "numbers": (jwt.encode(claims(channels=[1]), SECRET), "not a list of names"),
    "end that is no time": (jwt.encode(claims(exp="soon"), SECRET), "cannot be read"),
    "no object": (jwt.api_jws.encode(b"[1]", SECRET), "cannot be read"),
    "another audience": (jwt.encode(claims(aud="shop"), SECRET), "another audience"),
    "cut": (jwt.encode(claims(), SECRET)[:-3], "of no key|cannot be read"),
}


@pytest.mark.parametrize("name", BAD)
def test_tokens_that_let_nobody_in(name):
    """Each is refused with a reason that shows nothing of it."""
    token, reason = BAD[name]
    with pytest.raises(TokenError, match=reason) as caught:
        Keys([SECRET], [public(RSA)]).grant(token)
    assert token not in str(caught.value)


def test_token_without_end_counts_where_it_may():
    """RELAY_JWT_REQUIRE_EXP=false; one that has an end still ends."""
    keys = Keys([SECRET], [], require_exp=False)
    assert keys.grant(jwt.encode({"channels": ["a"]}, SECRET)).expires_at is None
    with pytest.raises(TokenError, match="has expired"):
        keys.grant(jwt.encode(claims(exp=1), SECRET))


@pytest.mark.parametrize(
    ("secrets", "public_keys", "text"),
    [
        ([public(RSA)], [], "PEM key, not a secret"),
        ([], [private(RSA)], "private key"),
        ([], ["-----BEGIN PUBLIC KEY-----\nx\n-----END PUBLIC KEY-----"], "cannot be read"),
        ([], [public(rsa.generate_private_key(65537, 1024))], "too short"),
        ([], [public(ec.generate_private_key(ec.SECP256K1()))], "kind that is not known"),
    ],
)
def test_keys_that_cannot_be_used(secrets, public_keys, text):
    """The relay does not start with one, and says which it takes."""
    with pytest.raises(SettingsError, match=text):
        Keys(secrets, public_keys)
