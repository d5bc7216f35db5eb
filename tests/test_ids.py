"""Which ids are accepted, and how they are made from foreign ones."""

from __future__ import annotations

import re
import unicodedata

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from orcs_redis.errors import InvalidIdError
from orcs_redis.model.ids import check_id, foreign_id

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


# Foreign ids

FOREIGN = [
    (("adk", "user-1", "s_1"), "adk,user-1,s_1"),
    (("a@example.org", "2026-11-26=1+1"), "a@example.org,2026-11-26=1+1"),
    (("Chat", "AB"), "^chat,^a^b"),
    (("chat", "ab"), "chat,ab"),
    (("a,b",), "a%2cb"),
    (("a", "b"), "a,b"),
    (("a/b\\c d:e",), "a%2fb%5cc%20d%3ae"),
    (("%", "^", "~"), "%25,%5e,%7e"),
    ((".a", ".b"), "%2ea,.b"),
    (("",), "%"),
    (("", ""), ","),
    (("", "a", ""), ",a,"),
    (("caf\u00e9",), "caf%c3%a9"),
    (("cafe\u0301",), "cafe%cc%81"),
    (("\U0001f600",), "%f0%9f%98%80"),
    (("\ud83d\ude00",), "%ed%a0%bd%ed%b8%80"),  # two lone surrogates
    (("\0\n",), "%00%0a"),
    (("a" * 200,), "a" * 200),
    (("a" * 201,), "a" * 135 + "~a92efd82109373e58f9a2056dee01e807e216ce6075f7051207c0a9f7d666e50"),
]

anything = st.text(st.characters(exclude_categories=()), max_size=80)  # lone surrogates too
tricky = st.text("aA.,%^~-/\\ 2e\u0130\u0131\u00df\u017f\u212a\ud800", max_size=80)
tuples = st.lists(anything | tricky, min_size=1, max_size=4).map(tuple)


def parts_of(id: str) -> tuple[str, ...]:
    """What an id that was not cut was made from."""

    def part(text: str) -> str:
        data = b""
        for percent, upper, plain in re.findall(r"%(..)|\^(.)|(.)", text):
            data += bytes.fromhex(percent) if percent else (upper.upper() or plain).encode()
        return data.decode(errors="surrogatepass")

    return ("",) if id == "%" else tuple(part(each) for each in id.split(","))


@pytest.mark.parametrize(("parts", "id"), FOREIGN)
def test_foreign(parts: tuple[str, ...], id: str) -> None:
    """These are what they were when sessions were stored under them."""
    assert foreign_id(*parts) == id


@given(tuples)
def test_foreign_ids_are_valid(parts: tuple[str, ...]) -> None:
    """Each is a session id, and what a file system may take for the same is the same: ASCII without upper case."""
    id = foreign_id(*parts)
    assert check_id(id) == id == id.lower()
    assert id.isascii()


@given(tuples)
def test_foreign_ids_can_be_taken_apart(parts: tuple[str, ...]) -> None:
    """One that was not cut gives back its parts, so no two tuples have the same; only one that was cut has a ~."""
    id = foreign_id(*parts)
    if "~" in id:
        assert re.fullmatch(r"[^~]{132,135}~[0-9a-f]{64}", id)
        assert not re.search(r"%.?~|\^~", id)
    else:
        assert parts_of(id) == parts


@given(tuples, tuples, st.sampled_from(["", "x", "\u00e9", "X"]), st.integers(0, 250))
def test_foreign_ids_differ(one: tuple[str, ...], other: tuple[str, ...], char: str, count: int) -> None:
    """Different tuples have different ids, cut ones with the same beginning too."""
    assume(one != other)
    assert foreign_id(*one) != foreign_id(*other)
    assert foreign_id(char * count, *one) != foreign_id(char * count, *other)


@pytest.mark.parametrize("parts", [(5,), ("a", None), (b"a",), (["a"],)])
def test_foreign_parts_are_strings(parts: tuple[object, ...]) -> None:
    """Anything else is a TypeError, so no number is taken for its text."""
    with pytest.raises(TypeError, match="is a str, not"):
        foreign_id(*parts)  # type: ignore[arg-type]


def test_foreign_ids_have_a_part() -> None:
    """No part is a ValueError."""
    with pytest.raises(ValueError, match="at least one"):
        foreign_id()
