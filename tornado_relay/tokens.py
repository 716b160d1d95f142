"""JSON Web Tokens that say which channels their bearer may listen to.

A token has the claim ``channels``, a list of names, each exact or with a ``*`` at its end, and ``exp``, when it
ends (RFC 7519). Which algorithms count is up to the kind of the key, never to the token (RFC 8725, section 3.1).
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from . import channels as names
from . import settings
from .access import Grant
from .errors import SettingsError, TokenError
from .settings import Settings
from .values import PEM

MIN_SECRET_BYTES = 32
"""What a secret should have at least (RFC 7518, section 3.2)."""

_HMAC = ("HS256", "HS384", "HS512")
_RSA = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512")
_CURVES = {"secp256r1": "ES256", "secp384r1": "ES384", "secp521r1": "ES512"}


def subscribe_token(channels: str | Iterable[str], ttl: float = 3600, *, key: str | None = None) -> str:
    """
    Return a token for a stream's cookie ``relay_token``, its ``Authorization`` header or its ``?token=``.

    Args:
        channels: Names of channels, each exact or with a ``*`` at its end, which stands for anything.
        ttl: Seconds until the token ends, and the streams that were opened with it.
        key: The secret, or the PEM text of a private key. By default it is what ``RELAY_JWT_SECRET`` says, in
            Django's ``SSE_RELAY``, the environment or ``.env``.

    Raises:
        ChannelError: If a name cannot be a channel's.
        ValueError: If there are no channels, or ``ttl`` is not more than 0.
        SettingsError: If there is no key, or it cannot sign.

    """
    wanted = [channels] if isinstance(channels, str) else list(channels)
    if not wanted:
        raise ValueError("subscribe_token() needs at least one channel; '*' stands for all")
    if not ttl > 0:
        raise ValueError(f"ttl is {ttl!r}; it must be more than 0 seconds")
    for name in wanted:
        names.check(name)
    jwt = _jwt()
    if key is None:
        key = settings.of_application("RELAY_JWT_SECRET")
        if not key:
            raise SettingsError("RELAY_JWT_SECRET is not set; set it to the relay's, or give key= a private key")
    now = time.time()
    claims = {"channels": wanted, "iat": int(now), "exp": now + ttl}
    loaded, algorithms = _private_key(key)
    return str(jwt.encode(claims, loaded, algorithm=algorithms[0]))


def keys_of(current: Settings) -> Keys:
    """
    Return the keys that these settings name.

    Raises:
        SettingsError: As `Keys` does.

    """
    secrets = [current.jwt_secret, current.jwt_secret_previous]
    public_keys = [current.jwt_public_key, current.jwt_public_key_previous]
    return Keys(
        [secret for secret in secrets if secret],
        [text for text in public_keys if text],
        require_exp=current.jwt_require_exp,
    )


def authenticates(current: Settings) -> bool:
    """
    Return whether a relay with these settings asks who somebody is before it lets them listen.

    Raises:
        SettingsError: As `Keys` does.

    """
    return bool(keys_of(current)) or bool(current.auth_url)


class Keys:
    """
    The keys by which tokens are verified.

    Args:
        secrets: For HS256, HS384 and HS512.
        public_keys: PEM texts: RSA (RS and PS), an elliptic curve (ES), or Ed25519 and Ed448 (EdDSA).
        require_exp: Whether a token must say when it ends.

    Raises:
        SettingsError: If PyJWT is not installed, or a key cannot be used.

    """

    def __init__(self, secrets: Sequence[str], public_keys: Sequence[str], *, require_exp: bool = True) -> None:
        self._required = ["channels", "exp"] if require_exp else ["channels"]
        self._keys: list[tuple[Any, tuple[str, ...]]] = []
        if secrets or public_keys:
            self._jwt = _jwt()
            # For each token that a short secret verifies; it is logged once, at the start.
            warnings.filterwarnings("ignore", message=".*below the minimum recommended length")
            self._keys = [(_secret(secret), _HMAC) for secret in secrets]
            self._keys += [_public_key(text) for text in public_keys]

    def __bool__(self) -> bool:
        return bool(self._keys)

    def grant(self, token: str) -> Grant:
        """
        Return what ``token`` lets its bearer listen to.

        Raises:
            TokenError: If it is no valid token.

        """
        jwt, claims, error = self._jwt, None, "is of no key that this relay has"
        for key, algorithms in self._keys:
            try:
                # "iat" says nothing about validity, and a clock that is a second ahead must not refuse.
                options = {"require": self._required, "verify_iat": False}
                claims = jwt.decode(token, key, algorithms=algorithms, options=options)
                break
            except (jwt.InvalidSignatureError, jwt.InvalidAlgorithmError, jwt.InvalidKeyError):
                continue
            except jwt.ExpiredSignatureError:
                error = "has expired"
            except jwt.ImmatureSignatureError:
                error = "is not valid yet"
            except jwt.MissingRequiredClaimError as exc:
                error = f"has no claim {exc.claim!r}"
            except jwt.InvalidAudienceError:
                error = "is for another audience"
            except (jwt.PyJWTError, ValueError, TypeError, RecursionError, OverflowError):
                error = "cannot be read"
            break
        if claims is None:
            raise TokenError(f"the token {error}")
        granted = claims["channels"]
        if not isinstance(granted, list) or not all(isinstance(name, str) for name in granted):
            raise TokenError("the token's claim 'channels' is not a list of names")
        return Grant(granted, _expiry(claims))


def _expiry(claims: dict[str, Any]) -> float | None:
    if claims.get("exp") is None:
        return None
    expires_at = float(claims["exp"])
    # PyJWT takes whole seconds only: a token would live on for up to one.
    if expires_at <= time.time():
        raise TokenError("the token has expired")
    return expires_at


def _jwt() -> Any:
    try:
        import jwt  # noqa: PLC0415  (an extra, and half of the time that importing this package would take)
    except ModuleNotFoundError as exc:
        raise SettingsError("PyJWT is not installed; install sse-relay-server[jwt]") from exc
    return jwt


def _secret(text: str) -> bytes:
    if PEM in text:
        raise SettingsError("RELAY_JWT_SECRET holds a PEM key, not a secret; a public key goes to RELAY_JWT_PUBLIC_KEY")
    return text.encode()


def _public_key(text: str) -> tuple[Any, tuple[str, ...]]:
    from cryptography.exceptions import UnsupportedAlgorithm  # noqa: PLC0415
    from cryptography.hazmat.primitives import serialization  # noqa: PLC0415

    if "PRIVATE KEY" in text:
        raise SettingsError(
            "RELAY_JWT_PUBLIC_KEY holds a private key, which the relay should not have; give the public one "
            "(openssl pkey -in private.pem -pubout)"
        )
    try:
        key = serialization.load_pem_public_key(text.encode())
    except (ValueError, UnsupportedAlgorithm) as exc:
        raise SettingsError("RELAY_JWT_PUBLIC_KEY cannot be read as a public key in PEM") from exc
    return _with_algorithms(key)


def _private_key(text: str) -> tuple[Any, tuple[str, ...]]:
    if PEM not in text:
        return _secret(text), _HMAC
    from cryptography.exceptions import UnsupportedAlgorithm  # noqa: PLC0415
    from cryptography.hazmat.primitives import serialization  # noqa: PLC0415

    try:
        key = serialization.load_pem_private_key(text.encode(), None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as exc:
        raise SettingsError("the private key cannot be read; give it in PEM, without a passphrase") from exc
    return _with_algorithms(key)


def _with_algorithms(key: Any) -> tuple[Any, tuple[str, ...]]:
    from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa  # noqa: PLC0415

    if isinstance(key, rsa.RSAPublicKey | rsa.RSAPrivateKey):
        if key.key_size < 2048:
            raise SettingsError(
                f"an RSA key of {key.key_size} bits is too short; it needs 2,048 (RFC 7518, section 3.3)"
            )
        return key, _RSA
    if isinstance(key, ec.EllipticCurvePublicKey | ec.EllipticCurvePrivateKey) and key.curve.name in _CURVES:
        return key, (_CURVES[key.curve.name],)
    if isinstance(
        key, ed25519.Ed25519PublicKey | ed25519.Ed25519PrivateKey | ed448.Ed448PublicKey | ed448.Ed448PrivateKey
    ):
        return key, ("EdDSA",)
    raise SettingsError("the key is of a kind that is not known; use RSA, P-256, P-384, P-521, Ed25519 or Ed448")
