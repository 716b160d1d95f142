"""What a parent and its child exchange, over real pipes and forks."""

import os
import resource
import select
from pathlib import Path

import pytest
from servers import until

from tornado_relay.counts import Ledger
from tornado_relay.limits import Tally
from tornado_relay.process import MAX_REPORT, Process, Report, died, fork

LETTERS = "mülleröäü€🙂"


@pytest.fixture
def told():
    """Have a child write ``pieces`` into its pipe, and return the process as its parent then sees it."""
    processes = []

    def told(*pieces, ended=True):
        pulse = os.memfd_create("pulse")
        os.ftruncate(pulse, 8)
        pipe, write = os.pipe()
        process = Process(pulse, pipe, 0, -1)
        processes.append(process)
        for piece in pieces:
            if callable(piece):
                piece(write)
                write = -1
            else:
                os.write(write, piece)
            process.read_report()
        if write >= 0 and ended:
            os.close(write)
        if process.pipe >= 0:
            process.read_report()
        return process

    yield told
    for process in processes:
        process.close()


@pytest.mark.parametrize("pad", range(4))
def test_long_report_arrives_with_its_beginning_and_its_end(told, pad):
    """The cut is marked, and goes through no letter, whatever the letters around it are."""
    text = "x" * pad + LETTERS * 1000 + "; give it a scheme"
    process = told(lambda write: Report(write)(text))
    begin, end = process.trouble.split(" [...] ")
    assert text.startswith(begin)
    assert text.endswith(end)
    assert select.PIPE_BUF - 20 < len(process.trouble.encode()) <= select.PIPE_BUF
    assert not process.ready


def test_report_with_letters_that_are_not_text_arrives(told):
    """A value from the environment may have bytes that are not UTF-8."""
    assert told(lambda write: Report(write)("no \udcff")).trouble == "no \\udcff"


@pytest.mark.parametrize(
    ("pieces", "trouble"),
    [
        ((b"\xff\xfe\0",), "\ufffd\ufffd\0"),
        (("é".encode()[:1],), "\ufffd"),
        ((b"it can", b"not be"), "it cannot be"),
        ((b"x" * 40_000, b"x" * 40_000), "x" * 80_000),
        ((), ""),
    ],
)
def test_report_may_be_of_any_bytes_and_in_pieces(told, pieces, trouble):
    """Another version may report otherwise; nothing of it is an error in the parent."""
    process = told(*pieces)
    assert (process.ready, process.trouble, process.pipe) == (False, trouble, -1)


def test_report_without_an_end_is_not_waited_for(told):
    """A process that keeps the pipe open holds up nobody, and a dead one's report is complete as it is."""
    process = told(b"rea", ended=False)
    assert (process.ready, process.pipe >= 0) == (False, True)
    process.read_report(ended=True)
    assert (process.trouble, process.pipe) == ("rea", -1)


def test_endless_report_is_cut(told):
    """The parent keeps no more than it may be told."""
    process = told(*[b"x" * 40_000] * 2, ended=False)
    assert process.pipe == -1
    assert MAX_REPORT < len(process.trouble) <= 2 * MAX_REPORT


def test_fork_that_cannot_be_leaves_no_descriptor():
    """The supervisor tries again and again: each try must give back what it took."""
    descriptors = Path("/proc/self/fd")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = sorted(int(path.name) for path in descriptors.iterdir())
    try:
        for room in range(1, 3):
            lowest = [number for number in range(opened[-1] + 5) if number not in opened]
            resource.setrlimit(resource.RLIMIT_NOFILE, (lowest[room], before[1]))
            with pytest.raises(OSError, match="Too many open files"):
                fork(lambda *_: 0, [], 0)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    until(lambda: sorted(int(path.name) for path in descriptors.iterdir()) == opened, "as many as before")


def test_memory_that_is_shared_cannot_be_cut_off():
    """Whoever looked at what is no longer there would be ended by the kernel."""
    process = fork(lambda *_: 0, [], 0)
    os.waitpid(process.pid, 0)
    tally, ledger = Tally(1), Ledger(1)
    for descriptor in (process.pulse, tally.descriptor, ledger.descriptor):
        with pytest.raises(PermissionError):
            os.ftruncate(descriptor, 0)
    process.close()
    os.close(tally.descriptor)
    os.close(ledger.descriptor)


@pytest.mark.parametrize(
    ("status", "said"),
    [(3, "ended with status 3"), (-9, "was ended by SIGKILL"), (-40, "was ended by signal 40")],
)
def test_end_of_a_process_in_words(status, said):
    """Most real-time signals have no name."""
    assert died(status) == said
