"""``python -m tornado_relay`` is the command ``sse-relay-server``."""

import sys

from .cli import main

sys.exit(main())
