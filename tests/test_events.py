import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tornado_relay import EventError
from tornado_relay.events import (
    HEARTBEAT,
    KEYS,
    Event,
    encode,
    frame,
    parse,
    position,
    serialize,
    stream_open,
    stream_reset,
)
from tornado_relay.eventsource import Parser, Received

# Anything a Python string may hold, with what the wire format treats specially more often than chance would.
special = [
    "\r",
    "\n",
    "\r\n",
    "\0",
    ":",
    " ",
    "\ufeff",
    "\u2028",
    "\ud800",
    "\ndata: x",
    "\rid: 1",
    "\r\nretry: 5",
    "\n\n",
    "\nevent: y\n\n",
]
texts = st.lists(st.one_of(st.characters(), st.sampled_from(special)), max_size=20).map("".join)
clean = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
lines = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n\0"), max_size=60)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | clean,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(clean, inner, max_size=3),
    max_leaves=8,
)
separators = st.sampled_from(["\n", "\r", "\r\n"])


def read(*frames):
    """What a page gets of these frames, as the HTML standard reads them."""
    parser = Parser()
    return list(parser.feed(b"".join(frames).decode())), parser


def lf(text):
    return text.replace("\r\n", "\n").replace("\r", "\n")


@given(data=clean, event=lines, id=lines, sep=separators, comment=clean)
def test_text_of_every_field_comes_out_of_a_standard_parser(data, event, id, sep, comment):  # noqa: A002
    """Whatever text notify() accepts is what a page gets, line ends being LF."""
    payload = {"data": data, "event": event, "id": id, "sep": sep, "comment": comment}
    (received,), _ = read(encode(parse(serialize(payload))))
    assert received == Received(event or "message", lf(data), id)


@given(
    st.builds(
        Event,
        data=texts | st.none(),
        event=texts | st.none(),
        id=texts | st.none(),
        comment=texts | st.none(),
        sep=separators,
    )
)
def test_no_text_makes_a_second_field_or_a_second_event(event):
    """Line breaks and NUL in any field, wherever they come from, end up in that field or nowhere."""
    received, parser = read(encode(Event(data="before")), encode(event), encode(Event(data="after")))
    expected = 1 if event.data is not None or event.event else 0
    assert len(received) == 2 + expected
    assert received[0].data == "before"
    assert received[-1].data == "after"
    assert received[-1].event == "message"
    assert parser.retry is None
    if event.id is None:
        assert parser.last_event_id == ""


@given(json_values)
def test_data_that_is_no_text_arrives_as_json(value):
    """An object, number, list or null in data is JSON for the page."""
    (received,), _ = read(encode(parse(serialize({"data": value}))))
    assert received.data == lf(value) if isinstance(value, str) else json.loads(received.data) == value


@given(texts)
@example("[" * 100_000)
@example('{"data": 1e999}')
@example('{"data": NaN}')
@example("1" * 5000)
@example('{"id": ' + "1" * 5000 + "}")
@example("\ud800")
def test_any_payload_becomes_one_frame(payload):
    """Nothing that a publisher sends makes the relay fail, and every payload without event keys is data."""
    received, _ = read(encode(parse(payload)))
    assert len(received) <= 1
    if not payload.lstrip().startswith("{"):
        assert received[0].event == "message"


@pytest.mark.parametrize(
    "payload", ["hello", '"quoted"', "[1,2]", "42", "null", "{}", '{"message":"x"}', '{"data":1,"x":2}', ""]
)
def test_payload_of_another_shape_is_the_data_of_a_message(payload):
    """Plain text, other JSON, and objects with keys of their own arrive word for word."""
    assert parse(payload) == Event(data=payload)


@pytest.mark.parametrize(
    ("payload", "event"),
    [
        ('{"data":"x"}', Event(data="x")),
        (
            '{"event":"e","id":1,"data":{"a":1},"retry":5,"comment":"c","sep":"\\r\\n"}',
            Event('{"a":1}', "e", "1", 5, "c", "\r\n"),
        ),
        ('{"data":null}', Event(data="null")),
        ('{"event":null,"id":null,"retry":null,"comment":null,"sep":null,"data":"x"}', Event(data="x")),
        ('{"data":"x","retry":"250"}', Event(data="x", retry=250)),
        ('{"data":"x","retry":-1}', Event(data="x")),
        ('{"data":"x","retry":true}', Event(data="x")),
        ('{"data":"x","retry":"soon"}', Event(data="x")),
        ('{"data":"x","sep":"\\n\\n"}', Event(data="x")),
        ('{"data":"x","event":"a\\r\\nb\\u0000"}', Event(data="x", event="ab")),
        ('{"data":"x","id":true}', Event(data="x", id="true")),
    ],
)
def test_event_objects_are_read_leniently(payload, event):
    """Each key is optional; a value that cannot be used is made harmless and costs nothing else."""
    assert parse(payload) == event


def test_event_without_data_still_fires():
    """{"event": "STOP"} reaches the page's listener: a browser fires nothing without a data field."""
    assert read(encode(parse('{"event":"STOP"}')))[0] == [Received("STOP", "", "")]


def test_id_retry_and_comment_alone_fire_nothing():
    """They set the page's position and waiting time, and are no events."""
    received, parser = read(
        *(encode(parse(payload)) for payload in ('{"id":"9"}', '{"retry":70}', '{"comment":"a\\nb"}'))
    )
    assert (received, parser.last_event_id, parser.retry) == ([], "9", 70)


@given(st.text(st.characters(categories=["Cs"]), min_size=1, max_size=3))
def test_half_a_surrogate_pair_is_refused_by_the_publisher_and_replaced_by_the_relay(half):
    """UTF-8 has no form for it: notify() says so, and what comes by hand arrives with U+FFFD."""
    with pytest.raises(EventError, match="surrogate"):
        serialize({"data": f"x{half}"})
    (received,), _ = read(encode(parse(json.dumps({"data": f"x{half}y"}))))
    assert received.data.startswith("x")
    assert received.data.endswith("y")


@pytest.mark.parametrize(
    ("payload", "named"),
    [
        ({}, "empty"),
        ([], "dict"),
        ("text", "dict"),
        ({"evnt": "x"}, "'evnt'"),
        ({"event": "a\nb"}, "'event'"),
        ({"event": "a\rb"}, "'event'"),
        ({"id": "a\0b"}, "'id'"),
        ({"event": 1.5}, "'event'"),
        ({"id": True}, "'id'"),
        ({"id": ["x"]}, "'id'"),
        ({"retry": "5"}, "'retry'"),
        ({"retry": -5}, "'retry'"),
        ({"retry": True}, "'retry'"),
        ({"comment": 5}, "'comment'"),
        ({"sep": ";"}, "'sep'"),
        ({"data": float("nan")}, "'data'"),
        ({"data": object()}, "'data'"),
        ({"data": {1, 2}}, "'data'"),
        ({"id": 10**5000}, "'id'"),
    ],
)
def test_what_cannot_be_sent_is_refused_by_name(payload, named):
    """The error names the field and says what would be right."""
    with pytest.raises(EventError, match=named):
        serialize(payload)


def test_serialized_event_is_compact_and_unescaped():
    """PostgreSQL's limit is in bytes: no blanks, and UTF-8 in place of escapes."""
    assert serialize({"event": "é", "data": {"a": [1, 2]}}) == '{"event":"é","data":{"a":[1,2]}}'


def test_stream_reset_names_reason_and_channels():
    """A page can read from it what it may have missed."""
    (received,), _ = read(stream_reset("broker-reconnect", ("a", "b")))
    assert received.event == "stream-reset"
    assert json.loads(received.data) == {"reason": "broker-reconnect", "channels": ["a", "b"]}


@given(texts, st.booleans())
def test_stream_open_tells_the_position_as_id_and_data(place, resumed):
    """A client keeps it as its last event id, a page can read it, and no text adds a field."""
    (received,), parser = read(stream_open(place, resumed=resumed))
    told = json.loads(received.data)
    assert (received.event, told["resumed"]) == ("stream-open", resumed)
    if not set(place) & set("\r\n\0") and place.isprintable():
        assert received.id == parser.last_event_id == told["id"] == place


def test_position_is_an_event_with_data():
    """Firefox, WebKit and several libraries forget the id of a block without data."""
    assert position("aaaaaaaa-7") == b'id: aaaaaaaa-7\nevent: stream-position\ndata: {"id":"aaaaaaaa-7"}\n\n'


def test_place_of_an_event_follows_the_id_of_its_publisher():
    """The page sees the publisher's id; a client that comes back sends the exact place."""
    own = frame('{"id":"own","data":"x"}', "aaaaaaaa-7")
    assert own == b"id: own\ndata: x\n\n" + position("aaaaaaaa-7")
    assert frame('{"data":"x"}', "aaaaaaaa-7") == b"id: aaaaaaaa-7\ndata: x\n\n"


@given(
    st.lists(st.builds(Event, data=texts, event=texts | st.none(), id=texts | st.none(), sep=separators), max_size=4)
)
def test_heartbeat_between_any_two_blocks_changes_nothing(blocks):
    """It is a comment line of the block behind it, whatever line ends the block before it has."""
    frames = [stream_reset("x", ("a",)), *map(encode, blocks), position("aaaaaaaa-7")]
    with_heartbeats = [part for block in frames for part in (HEARTBEAT, block, HEARTBEAT, HEARTBEAT)]
    assert read(*with_heartbeats)[0] == read(*frames)[0]


def test_keys_are_those_of_the_contract():
    """The six keys of the predecessor's events."""
    assert set(KEYS) == {"event", "id", "data", "retry", "comment", "sep"}
