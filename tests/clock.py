"""A wall clock that a test can set, by libfaketime."""

import subprocess

from programs import program


class Clock:
    """The wall clock of those processes that have its environment."""

    def __init__(self, folder):
        self._file = folder / "clock"
        shown = [program("faketime"), "-f", "+0", "printenv", "LD_PRELOAD"]
        library = subprocess.run(shown, capture_output=True, text=True, check=True).stdout.strip()
        self.environment = {
            "LD_PRELOAD": library,
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_NO_CACHE": "1",
            # Nobody can set that one.
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "DONT_FAKE_MONOTONIC": "1",
        }
        self.set("+0")

    def set(self, offset):
        """Move the clock to so far from the real time."""
        new = self._file.with_suffix(".new")
        new.write_text(f"{offset}\n")
        new.replace(self._file)
