import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tornado_relay import PayloadTooLarge
from tornado_relay.brokers.postgres.envelope import MAX_PAYLOAD_BYTES, SHARED_CHANNEL, audible, physical, unwrap, wrap

names = st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=200) | st.just(SHARED_CHANNEL)


@given(
    names,
    st.dictionaries(st.sampled_from(["data", "id"]), st.text(st.characters(exclude_categories=["Cs"])), min_size=1),
)
def test_every_channel_and_event_comes_back(channel, event):
    """What is wrapped fits PostgreSQL's channel limit, and is unwrapped to the same channel and event."""
    target, payload = wrap(channel, json.dumps(event))
    assert len(target.encode()) <= 63
    message = unwrap(target, payload)
    assert (message.channel, json.loads(message.payload)) == (channel, event)


def test_short_names_travel_as_they_are():
    """63 bytes are a physical channel; one more shares."""
    assert physical("é" * 31 + "x") == "é" * 31 + "x"
    assert physical("é" * 32) == SHARED_CHANNEL


def test_shared_channel_cannot_be_listened_to_by_its_name():
    """A stream on that very name gets envelopes for itself only, not everybody's."""
    assert unwrap(SHARED_CHANNEL, '{"channel":"other","payload":{}}') is None
    target, payload = wrap(SHARED_CHANNEL, '{"data":"x"}')
    assert unwrap(target, payload)[0] == SHARED_CHANNEL


@pytest.mark.parametrize(
    "payload", ["x", "[]", "{}", '{"channel":5,"payload":{}}', '{"channel":"short","payload":{}}', "[" * 100_000]
)
def test_what_is_no_envelope_is_dropped(payload):
    """By hand anything can arrive on the shared channel; nothing of it passes as another channel's event."""
    assert unwrap(SHARED_CHANNEL, payload) is None


def test_equal_payloads_differ_on_the_wire():
    """PostgreSQL would fold equal ones of a transaction; the difference is blank to JSON."""
    sent = {wrap("c", '{"data":"+1"}')[1] for _ in range(1000)}
    assert len(sent) == 1000
    assert {json.dumps(json.loads(text)) for text in sent} == {'{"data": "+1"}'}


def test_equal_payloads_near_the_limit_differ_as_well():
    """As long as a few bytes are left."""
    payload = '{"data":"%s"}' % ("x" * 7979)
    assert len({wrap("c", payload) for _ in range(6)}) == 6


@pytest.mark.parametrize("channel", ["c", "x" * 200])
def test_limit_is_kept_to_the_byte(channel):
    """The largest event that fits is sent; a byte more is refused with limit and size."""
    overhead = len(wrap(channel, '{"data":""}')[1].rstrip().encode())
    room = MAX_PAYLOAD_BYTES - overhead
    assert len(wrap(channel, json.dumps({"data": "x" * room}, separators=(",", ":")))[1].encode()) == MAX_PAYLOAD_BYTES
    with pytest.raises(PayloadTooLarge, match=r"8,000 bytes.* 7,999"):
        wrap(channel, json.dumps({"data": "x" * (room + 1)}, separators=(",", ":")))


def test_audible_channels_include_twins_once():
    """Each asked for, each folded, none twice."""
    assert audible(["Orders", "orders", "x"]) == ("Orders", "orders", "x")
