"""What is on the board."""

from django.conf import settings
from django.db import models


class Task(models.Model):
    """Something to do, for somebody."""

    title = models.CharField(max_length=200)
    owner = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.CASCADE)
    done = models.BooleanField(default=False)

    def __str__(self):
        return self.title
