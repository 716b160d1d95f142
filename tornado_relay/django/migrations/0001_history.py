"""The history of events, as ``sse-relay-server init-db`` sets it up; what that has set up already is left as it is.

Where the database that events go to is no PostgreSQL, or another one, there is nothing to do.
"""

from typing import Any

from django.db import migrations

from tornado_relay import project, schema

VERSION = 1


def _forward(_apps: Any, schema_editor: Any) -> None:
    if _concerned(schema_editor):
        with schema_editor.connection.cursor() as cursor:
            for _ in schema.upgrade(cursor, VERSION):
                pass


def _backward(_apps: Any, schema_editor: Any) -> None:
    if _concerned(schema_editor):
        with schema_editor.connection.cursor() as cursor:
            schema.remove(cursor)


def _concerned(schema_editor: Any) -> bool:
    connection = schema_editor.connection
    return bool(connection.vendor == "postgresql" and connection.alias == project.alias())


class Migration(migrations.Migration):
    """No model is behind it: rows of the history are none of the application's business."""

    operations = (migrations.RunPython(_forward, _backward),)
