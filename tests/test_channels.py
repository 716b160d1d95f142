import pytest
from hypothesis import given
from hypothesis import strategies as st

from tornado_relay import ChannelError
from tornado_relay.channels import check, twin


@given(st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=200))
def test_printable_names_up_to_200_characters_pass(name):
    """Any script, blanks and punctuation."""
    assert check(name) == name


@pytest.mark.parametrize(
    ("name", "said"),
    [("", "empty"), ("x" * 201, "201"), ("a\nb", "control"), ("\0", "control"), ("a\x7f", "control"), ("\x85", "control"), ("\ud800", "surrogate"), (5, "int"), (None, "NoneType"), (b"x", "bytes")],
)  # fmt: skip
def test_other_names_are_refused_by_what_is_wrong(name, said):
    """The error says which rule is broken."""
    with pytest.raises(ChannelError, match=said):
        check(name)


@pytest.mark.parametrize(
    ("name", "folded"), [("Orders", "orders"), ("orders", None), ("ÄRGER-X", "Ärger-x"), ("日本", None)]
)
def test_twin_is_what_postgres_folds_to(name, folded):
    """Only ASCII letters fold, as in a UTF-8 database."""
    assert twin(name) == folded
