"""What `sse-relay-server size` reckons, held against what has been measured."""

import re
import sys

import pytest
from relay import ROOT, run

from tornado_relay.errors import SettingsError
from tornado_relay.sizing import BUSY, STREAMS, Load, plan

sys.path.insert(0, str(ROOT / "benchmarks"))

from simulate import LOADS, POINTS, simulate, table

PAGE = (ROOT / "docs/scaling.md").read_text()


def cells(heading):
    """The rows of the page's table that begins so."""
    head, _, *rows = PAGE[PAGE.index(heading) :].partition("\n\n")[0].splitlines()
    names = [cell.strip() for cell in head.strip("|").split("|")]
    return [dict(zip(names, (cell.strip() for cell in row.strip("|").split("|")), strict=True)) for row in rows]


@pytest.mark.parametrize("streams", [1, 10**4, 10**5, 10**6, 10**7])
@pytest.mark.parametrize("load_of", LOADS.values(), ids=LOADS)
def test_plan_has_as_many_workers_as_it_takes(load_of, streams):
    """With a host lost they are enough, and with fewer by a host's they would not be."""
    load = load_of(streams)
    found = plan(load)
    assert load.busy(found.left) <= BUSY
    assert found.worker_streams <= STREAMS
    assert found.each <= load.cores
    fewer = found.left - found.each
    assert not fewer or load.busy(fewer) > BUSY or load.streams / fewer > STREAMS


def test_what_all_hear_all_workers_take_in():
    """An event that reaches all streams costs every worker its part; one that reaches one stream, one worker."""
    for_all, for_one = Load(10_000, 100, 10_000), Load(10_000, 100, 1)
    assert for_all.heard(10) == pytest.approx(100)
    assert for_one.heard(10) == pytest.approx(10)


@pytest.mark.parametrize("load", [Load(10, 10**6, 10), Load(1, 10**5, 1), Load(10**6, 2 * 10**4, 10**6)])
def test_what_no_number_of_workers_carries_is_said(load):
    """An event for all costs each worker the same, however many they are: no plan has more of them than streams."""
    with pytest.raises(SettingsError, match=rf"no number of workers carries --rate {load.rate}:"):
        plan(load)


def test_used_up_first_comes_first():
    """Each with what to do, if more than half is used."""
    used = [limit.used for limit in plan(Load(10**7, 10**5, 1)).limits()]
    assert used == sorted(used, reverse=True)
    assert used[0] > 1


@pytest.mark.parametrize("row", cells("| streams of one worker |"), ids=lambda row: row["channels"])
def test_simulation_says_what_was_measured(row):
    """Of the points in docs/scaling.md: how busy a worker is, within a third of it."""
    point = tuple(int(row[name].replace(",", "")) for name in ("streams of one worker", "channels", "events a second"))
    assert point in POINTS
    busy, mean, _ = simulate(*point)
    simulated, measured = re.findall(r"(\d+) %", row["busy: simulated, measured"])
    assert f"{busy * 100:.0f}" == simulated
    assert busy == pytest.approx(int(measured) / 100, rel=1 / 3)
    assert row["an event takes: simulated, measured"].startswith(f"{mean * 1000:.2g} ms, ")


def test_table_is_what_the_code_says():
    """How busy, how late and what is used up first, from 10,000 to 10,000,000 streams."""
    head, *rows = table()
    assert "\n".join([head, *rows]) in PAGE


def test_command(tmp_path):
    """It needs no settings, and says what is used up first and what to do about it."""
    done = run("size", "--streams", "1000000", "--rate", "10000", "--reach", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "1,000,000 streams; 10,000 events a second of 200 bytes, each to 1 of them"
    found = plan(Load(1_000_000, 10_000, 1))
    assert f"{found.hosts} hosts of 8 cores, each with --workers {found.each}" in done.stdout
    first = found.limits()[0]
    where = next(number for number, line in enumerate(lines) if line.endswith(f"{first.name}: {first.text}"))
    assert lines[where - 1].endswith("first what is used up first:")
    assert lines[where + 1].strip() == f"-> {first.advice}"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--streams", "0", "--rate", "1"], "--streams: '0' is not a whole number, 1 or more"),
        (["--streams", "5", "--rate", "-1"], "--rate: '-1' is not a number of events a second, more than 0"),
        (["--streams", "5"], "required: --rate"),
        (["--streams", "5", "--rate", "1", "--reach", "9"], "--reach 9 is more than --streams 5"),
        (["--streams", "5", "--rate", "1", "--event-bytes", "2000000"], "more than an event may have: 1048576"),
        (["--streams", "5", "--rate", "1", "--core", "9"], "there is no flag --core"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, flags, said):
    """In one line, with what would be right."""
    done = run("size", *flags, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
