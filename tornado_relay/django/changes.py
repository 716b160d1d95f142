"""Events of what happens to a model's rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from django.core.serializers.json import DjangoJSONEncoder
from django.db import transaction
from django.db.models import Model
from django.db.models.signals import post_delete, post_save

from .. import project
from ..publish import notify


def publish_changes(model: type[Model], channel: str | Callable[[Any], str | None], fields: Sequence[str]) -> None:
    """
    Send an event whenever a row of ``model`` is saved or deleted; to be called in an ``AppConfig.ready()``.

    The event is named by the model and what happened, such as ``order.created``, ``order.updated`` or ``order.deleted``;
    its data is JSON of ``fields``, as Django writes it. It is sent in the transaction that changes the row. Django
    sends no signals for ``update()``, ``bulk_create()`` and raw SQL, so these send no events; fixtures do not either.

    Args:
        model: The model's class.
        channel: A channel, or what returns it for a row; None for a row that no one is to hear of.
        fields: Names of the model's fields; a foreign key gives the other row's key.

    Raises:
        FieldDoesNotExist: If the model has no such field.
        ValueError: If a field stands for many rows, or there are none.

    """
    columns = {name: model._meta.get_field(name) for name in fields}  # noqa: SLF001  (Django's documented name)
    if not columns:
        raise ValueError("publish_changes() needs at least one field")
    for name, column in columns.items():
        if not column.concrete or column.many_to_many:
            raise ValueError(f"the field {name!r} of {model.__name__} is no column of its table")

    def send(instance: Any, happened: str, using: str) -> None:
        target = channel(instance) if callable(channel) else channel
        if target is None:
            return
        values = {name: column.value_from_object(instance) for name, column in columns.items()}
        event = {
            "event": f"{model._meta.model_name}.{happened}",  # noqa: SLF001
            "data": json.dumps(values, cls=DjangoJSONEncoder, ensure_ascii=False, separators=(",", ":")),
        }
        if using == project.alias():
            notify(target, event)
        else:  # the relay does not listen to that database
            transaction.on_commit(lambda: notify(target, event), using=using)

    def saved(instance: Any, created: bool, raw: bool, using: str, **_: Any) -> None:
        if not raw:
            send(instance, "created" if created else "updated", using)

    def deleted(instance: Any, using: str, **_: Any) -> None:
        send(instance, "deleted", using)

    for signal, receiver in ((post_save, saved), (post_delete, deleted)):
        signal.connect(receiver, sender=model, weak=False, dispatch_uid=("sse_relay", model, channel))
