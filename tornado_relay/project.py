"""What a Django project says of the relay: its setting ``SSE_RELAY``, a dictionary. The environment says the rest.

Loads no Django: it looks at the one that the process has loaded, if it has.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from .errors import SettingsError

VARIABLES = ("REDIS_URL", "DATABASE_URL", "RELAY_USE_PG", "RELAY_JWT_SECRET", "RELAY_URL")
"""Keys that stand in for the environment's variables of these names."""

NAMES = (*VARIABLES, "DATABASE")


def conf() -> Any:
    """Return Django's settings, or None outside of a Django project."""
    module = sys.modules.get("django.conf")
    return module.settings if module and module.settings.configured else None


def own() -> Mapping[str, Any]:
    """
    Return ``SSE_RELAY``, empty where there is none.

    Raises:
        SettingsError: If it is no dictionary.

    """
    found = getattr(conf(), "SSE_RELAY", None)
    if found is None:
        return {}
    if not isinstance(found, Mapping):
        raise SettingsError(f"SSE_RELAY is a {type(found).__name__}; it must be a dictionary")
    return found


def variables() -> dict[str, str]:
    """Return those of `VARIABLES` that ``SSE_RELAY`` gives, as texts; None is as if it were not there."""
    given = own()
    return {name: _text(given[name]) for name in VARIABLES if given.get(name) is not None}


def alias() -> str:
    """Return Django's alias of the database that events go to by default."""
    return str(own().get("DATABASE") or "default")


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
