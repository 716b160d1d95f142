"""``manage.py``."""
