"""Programs that a test needs and a newcomer's machine may lack."""

import os
import shutil

import pytest


def program(*names):
    """
    Return the path of the first of ``names`` that is installed.

    Otherwise the test is skipped with the reason, or fails where SSE_RELAY_TEST_ALL is set, as in .ci/run:
    there nothing may be skipped unseen.
    """
    for name in names:
        if path := shutil.which(name):
            return path
    reason = f"{' or '.join(names)} is not installed"
    if os.environ.get("SSE_RELAY_TEST_ALL"):
        pytest.fail(reason)
    pytest.skip(reason)
