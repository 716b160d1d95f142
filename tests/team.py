"""A Django project as a team has it, in files: its own database, two models, and this package's app."""

import itertools
import json
import os
import subprocess
import sys
from urllib.parse import urlsplit

from relay import environment
from servers import PATIENCE

_numbers = itertools.count(1)

SETTINGS = """
import json, os, sys
if os.environ.get("DRIVER") == "psycopg2":
    sys.modules["psycopg"] = None  # Django prefers it; where it cannot be imported, psycopg2 is used
SECRET_KEY = "secret"
USE_TZ = True
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
INSTALLED_APPS = ["tornado_relay.django", "shop"]
DATABASES = json.loads(os.environ["DATABASES"])
SSE_RELAY = eval(os.environ["SSE"])
"""

MODELS = """
from django.db import models

class Customer(models.Model):
    name = models.CharField(max_length=50)

class Order(models.Model):
    customer = models.ForeignKey(Customer, on_delete=models.CASCADE)
    total = models.DecimalField(max_digits=9, decimal_places=2)
    note = models.TextField(default="")
    day = models.DateField(null=True)
    watchers = models.ManyToManyField(Customer, related_name="watched")
"""

APPS = """
from django.apps import AppConfig

class ShopConfig(AppConfig):
    name = "shop"

    def ready(self):
        from tornado_relay.django.changes import publish_changes
        Order = self.get_model("Order")
        publish_changes(Order, "orders", ["id", "total", "customer", "day"])
        publish_changes(Order, lambda order: f"customer-{order.customer_id}" if order.note else None, ["note"])
"""


class Project:
    """``run`` has ``manage.py`` do something, ``python`` runs code in the project."""

    def __init__(self, home, server):
        self.home = home
        self.server = server
        name = f"team{os.getpid()}_{next(_numbers)}"
        server.execute(f"CREATE DATABASE {name}")
        parts = urlsplit(server.url)
        self.url = server.url.removesuffix(parts.path) + f"/{name}"
        self.databases = {
            "default": {
                "ENGINE": "django.db.backends.postgresql",
                "NAME": name,
                "USER": parts.username,
                "PASSWORD": parts.password,
                "HOST": parts.hostname,
                "PORT": parts.port,
            },
            "files": {"ENGINE": "django.db.backends.sqlite3", "NAME": str(home / "db.sqlite3")},
        }
        self.sse_relay = {}
        self.driver = "psycopg"
        (home / "shop").mkdir()
        for path, text in {
            "conf.py": SETTINGS,
            "shop/__init__.py": "",
            "shop/models.py": MODELS,
            "shop/apps.py": APPS,
            "manage.py": "import sys\nfrom django.core.management import execute_from_command_line as e\ne(sys.argv)\n",
        }.items():
            (home / path).write_text(text)
        self.run("makemigrations", "shop")

    def start(self, *command, **options):
        """Return the process."""
        return subprocess.Popen(
            [sys.executable, *map(str, command)],
            cwd=self.home,
            env=environment(
                DJANGO_SETTINGS_MODULE="conf",
                DATABASES=json.dumps(self.databases),
                SSE=repr(self.sse_relay),
                DRIVER=self.driver,
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )

    def run(self, *arguments, status=0):
        """Return what the command printed, on either stream."""
        return self._end(self.start("manage.py", *arguments), status)

    def python(self, code):
        """Return what it printed."""
        start = "import django\ndjango.setup()\nfrom django.db import connection, transaction\n"
        start += "from tornado_relay import notify, current_event_id, subscribe_token\nfrom shop.models import Customer, Order\n"
        return self._end(self.start("-c", start + code), 0)

    @staticmethod
    def _end(process, status):
        out, errors = process.communicate(timeout=PATIENCE * 3)
        assert process.returncode == status, out + errors
        assert "Traceback" not in errors, errors
        return out + errors
