"""The parser against the HTML standard's own rules and examples."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tornado_relay.eventsource import Parser, Received

# Values of `retry:`, and the pause in milliseconds that each of our parsers takes from it. None
# stands for a value that is ignored.
RETRIES = [
    ("1500", 1500),
    ("0001500", 1500),
    ("999999999", 999_999_999),
    ("1000000000", None),
    ("0", None),
    ("9" * 15, None),
    ("9" * 5000, None),
    ("0" * 5000, None),
    ("1.5", None),
    ("-1", None),
    ("+1", None),
    ("1e3", None),
    ("0x10", None),
    ("٣", None),
    ("", None),
    ("x", None),
]


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


@pytest.mark.parametrize(("value", "pause"), RETRIES)
def test_retry_of_any_length(value, pause):
    """Only up to nine ASCII digits are taken; the stream goes on after any other value."""
    parser = Parser()
    assert list(parser.feed(f"retry: {value}\ndata: on\n\n")) == [Received("message", "on", "")]
    assert (parser.retry or None) == pause


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
