"""``manage.py people``."""

from django.contrib.auth import get_user_model
from django.core.management.base import BaseCommand


class Command(BaseCommand):
    """Makes the people of the example, who all have the password ``demo``."""

    help = "Makes alice, bob and carol, with the password demo."

    def handle(self, **_):
        for name in ("alice", "bob", "carol"):
            if not get_user_model().objects.filter(username=name).exists():
                get_user_model().objects.create_user(name, password="demo")
