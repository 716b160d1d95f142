"""The counts in memory that processes share."""

import os

from tornado_relay.counts import CLOSED, EVENTS, GAUGES, LATENCY, METRICS, OPENED, STREAMS, Counts, Ledger


def total(ledger, metric, value=""):
    return sum(row.get(metric, value) for row in ledger.rows())


def test_each_has_cells_of_its_own():
    """Counting one changes no other."""
    every = [(metric, value) for metric in (*METRICS, *GAUGES) if not metric.bounds for value in metric.at]
    counts = Counts(Ledger(1), 0)
    for number, (metric, value) in enumerate(every):
        counts.add(metric, value, number)
    for metric in METRICS:
        if metric.bounds:
            counts.observe(metric, metric.bounds[0], 1000)
            counts.observe(metric, 1000.0)
    assert [counts.get(metric, value) for metric, value in every] == list(range(len(every)))
    for metric in METRICS:
        if metric.bounds:
            assert counts.cells(metric) == [1000, *[0] * (len(metric.bounds) - 1), 1, metric.bounds[0] * 1000 + 1000]


def test_bucket_has_what_is_not_above_its_bound():
    """As Prometheus has it: le is less than or equal."""
    counts = Counts(Ledger(1), 0)
    for seconds in (0.0, LATENCY.bounds[0], LATENCY.bounds[1], LATENCY.bounds[1] + 1e-9, LATENCY.bounds[-1] + 1):
        counts.observe(LATENCY, seconds)
    *buckets, _ = counts.cells(LATENCY)
    assert buckets == [2, 1, 1, *[0] * (len(buckets) - 4), 1]


def test_counts_of_a_child_are_seen_and_stay():
    """Also when it ends without a word; its streams have died with it, and its gauges are gone."""
    ledger = Ledger(2)
    child = Counts(ledger, 1)
    if (pid := os.fork()) == 0:
        child.add(OPENED, number=3)
        child.add(STREAMS, number=3)
        child.add(STREAMS, number=-1)
        child.add(CLOSED, "client")
        os._exit(0)
    os.waitpid(pid, 0)
    assert (total(ledger, OPENED), total(ledger, STREAMS)) == (3, 2)
    Counts(ledger, 1).end()
    assert (total(ledger, OPENED), total(ledger, STREAMS)) == (3, 0)
    assert (total(ledger, CLOSED, "client"), total(ledger, CLOSED, "died")) == (1, 2)


def test_next_in_a_row_counts_on():
    """The sum does not fall, while what a process has counted itself begins with it."""
    ledger = Ledger(1)
    first = Counts(ledger, 0)
    first.add(EVENTS, number=5)
    first.end()
    second = Counts(ledger, 0)
    second.add(EVENTS)
    assert (total(ledger, EVENTS), first.own(EVENTS), second.own(EVENTS)) == (6, 6, 1)
