"""The app's entry in Django's registry."""

from django.apps import AppConfig


class RelayConfig(AppConfig):
    """Registers the checks."""

    name = "tornado_relay.django"
    label = "sse_relay"
    verbose_name = "SSE relay"

    def ready(self) -> None:
        """See `AppConfig.ready`."""
        from . import checks  # noqa: F401, PLC0415  (registers them)
