"""The parser against the HTML standard's own rules and examples."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tornado_relay.eventsource import Parser, Received


def read(text):
    return list(Parser().feed(text))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("data: YHOO\ndata: +2\ndata: 10\n\n", [("message", "YHOO\n+2\n10", "")]),
        (": test stream\n\ndata: first event\nid: 1\n\ndata:second event\nid\n\ndata:  third event\n\n",
         [("message", "first event", "1"), ("message", "second event", ""), ("message", " third event", "")]),
        ("data\n\ndata\ndata\n\ndata:", [("message", "", ""), ("message", "\n", "")]),
        ("data:test\n\ndata: test\n\n", [("message", "test", ""), ("message", "test", "")]),
        ("event: add\ndata: 73857293\n\n", [("add", "73857293", "")]),
        ("\ufeffdata: x\n\n", [("message", "x", "")]),
        ("data: \ufeffx\n\n", [("message", "\ufeffx", "")]),
        ("event: lost\n\ndata: x\n\n", [("message", "x", "")]),
        ("id: a\0b\ndata: x\n\n", [("message", "x", "")]),
        ("id: 1\n\ndata: x\n\n", [("message", "x", "1")]),
        ("data: a\r\rdata: b\r\n\r\ndata: c\n\n", [("message", "a", ""), ("message", "b", ""), ("message", "c", "")]),
        ("nonsense: 1\ndata: x: y\n\n", [("message", "x: y", "")]),
    ],
)  # fmt: skip
def test_standards_examples(text, expected):
    """What the standard says a stream means."""
    assert [(event.event, event.data, event.id) for event in read(text)] == expected


def test_retry_takes_ascii_digits_only():
    """Any other value is ignored."""
    parser = Parser()
    for value in ("1.5", "-1", "٣", "", "x"):
        list(parser.feed(f"retry: {value}\n"))
        assert parser.retry is None
    list(parser.feed("retry: 1500\n"))
    assert parser.retry == 1500


@given(st.lists(st.integers(0, 40)))
def test_where_the_text_is_cut_does_not_matter(cuts):
    """A stream read in pieces means the same, also when CRLF is cut in two."""
    text = "id: 1\r\ndata: a\r\ndata: b\r\n\r\nevent: e\rdata: c\r\r"
    parser, events, position = Parser(), [], 0
    for cut in sorted(cuts):
        events += parser.feed(text[position:cut])
        position = max(position, cut)
    events += parser.feed(text[position:])
    assert events == [Received("message", "a\nb", "1"), Received("e", "c", "1")]
