"""Which ids are accepted."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orcs_redis.errors import InvalidIdError
from orcs_redis.model.ids import check_id

GOOD = ["a", "a.b", "a" * 200, "é" * 100, "😀" * 50, "{x}", "a:b*[?] ", "~", "..."[1:].replace(".", "-"), "日本 語"]
BAD = ["", ".", "..", ".a", "a/b", "a\\b", "a\n", "\0", "a\x7f", "a\x85", "a" * 201, "é" * 101, "\ud800", 5, None, b"a"]


@pytest.mark.parametrize("id", GOOD)
def test_accepts(id: str) -> None:
    """Braces, colons, globs, spaces and any script are ordinary."""
    assert check_id(id) == id


@pytest.mark.parametrize("id", BAD)
def test_refuses(id: object) -> None:
    """Everything else is an InvalidIdError whose message doesn't repeat it."""
    with pytest.raises(InvalidIdError):
        check_id(id)  # type: ignore[arg-type]


@given(st.text(max_size=80))
def test_agrees_with_the_rule(id: str) -> None:
    """The rule, spelled out with unicodedata, gives the same answer."""
    allowed = (
        0 < len(id.encode(errors="surrogatepass")) <= 200
        and not any(unicodedata.category(c) in ("Cc", "Cs") or c in "/\\" for c in id)
        and not id.startswith(".")
    )
    try:
        check_id(id)
    except InvalidIdError:
        assert not allowed
    else:
        assert allowed
