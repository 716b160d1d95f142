"""The reference from the code: settings, commands, metrics, Python names, modules; each is a page of docs/reference/."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import tornado_relay
from tornado_relay import errors, project, testing
from tornado_relay.counts import NUMBER, PID, PROBE, Ledger
from tornado_relay.metrics import Exposition
from tornado_relay.settings import FIELDS, Settings

PACKAGE = Path(tornado_relay.__file__).parent


def settings() -> Iterator[str]:
    """Yield each setting: variable, meaning, flag, default."""
    for field in FIELDS:
        about = field.metadata
        flag, default = about["flag"], field.default
        yield f"## {about['variable']}\n\n{_sentence(about['meaning'])}\n"
        yield f"- flag: `{flag}`" + (f" and `--no-{flag[2:]}`" if field.type == "bool" else "")
        if default in ("", ()):
            yield "- default: none"
        else:
            yield f"- default: `{str(default).lower() if field.type == 'bool' else default}`"
        if about.get("secret"):
            yield "- a secret: as a flag it leaves the command line right after the start, and no log or error shows it"
        yield ""
    yield "## Of an application\n"
    yield "The key of `SSE_RELAY` in Django's settings comes before the environment's variable of the same name:\n"
    yield from (f"- `{name}`" for name in project.VARIABLES)


def commands() -> Iterator[str]:
    """Yield what `--help` says, and of each command what is its own."""
    text = _help()
    yield f"```text\n{text}\n```\n"
    for name in re.findall(r"^    ([a-z-]+) ", text.partition("COMMAND\n")[2].partition("\n\n")[0], re.MULTILINE):
        own = _help(name).partition("\n\n")[2].partition("\nsettings:")[0].strip()
        yield f"## {name}\n\n```text\n{own}\n```\n"


def _help(*command: str) -> str:
    return subprocess.run(
        [sys.executable, "-m", "tornado_relay", *command, "--help"],
        env={**os.environ, "COLUMNS": "100"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()


def metrics() -> Iterator[str]:
    """Yield each family: its name as Prometheus has it, meaning, type, labels and their values."""
    (row,) = ledger = Ledger(1).rows()
    for metric, number in ((PID, os.getpid()), (NUMBER, 0), (PROBE, 0.001)):
        row.set(metric, number)
    for family in Exposition(ledger, 1, Settings(max_connections=1), [("orders", 1)]).collect():
        suffix = {"counter": "_total", "info": "_info"}.get(family.type, "")
        yield f"## {family.name}{suffix}\n\n{_sentence(family.documentation)}\n\n- {family.type}"
        labels: dict[str, dict[str, None]] = {}
        for sample in family.samples:
            for label, value in sample.labels.items():
                labels.setdefault(label, {})[value] = None
        for label, values in labels.items():
            known = label not in {"worker", "channel", "version", "broker"}
            yield f"- `{label}`" + (f": {', '.join(f'`{value}`' for value in values)}" if known else "")
        yield ""


def python() -> Iterator[str]:
    """Yield directives of Sphinx' autodoc: the public names, from their docstrings."""
    public = [name for name in tornado_relay.__all__ if not name.startswith("_")]
    yield "## tornado_relay\n"
    yield from (_directive("function", f"tornado_relay.{name}") for name in public if name.islower())
    yield "## tornado_relay.errors\n\n```text"
    yield (errors.__doc__ or "").partition("\n\n")[2].rstrip() + "\n```\n"
    yield from (_directive("exception", f"tornado_relay.errors.{name}") for name in public if not name.islower())
    yield "## tornado_relay.django\n"
    yield _directive("function", "tornado_relay.django.anotify")
    yield _directive("function", "tornado_relay.django.changes.publish_changes")
    yield "## tornado_relay.testing\n"
    for name in sorted(testing.__all__, key=str.swapcase):
        yield _directive("function" if name.islower() else "class", f"tornado_relay.testing.{name}")


def _directive(kind: str, name: str) -> str:
    members = "\n   :members:" if kind == "class" else ""
    return f"```{{eval-rst}}\n.. auto{kind}:: {name}{members}\n```\n"


def modules() -> Iterator[str]:
    """Yield a table: each module, and what it is in its own words."""
    yield "| module | |\n|---|---|"
    for path in sorted(PACKAGE.rglob("*.py")):
        about = ast.get_docstring(ast.parse(path.read_text())) or ""
        first = " ".join(about.split("\n\n", maxsplit=1)[0].split()).replace("|", "&#124;")
        yield f"| `{path.relative_to(PACKAGE)}` | {first} |"


def _sentence(text: str) -> str:
    text = text[0].upper() + text[1:]
    return text if text.endswith(".") else f"{text}."


PAGES = {"settings": settings, "commands": commands, "metrics": metrics, "python": python, "modules": modules}
