"""Planted faults in what writes change: parts, merging, turns, records, labels."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any
from unittest import mock

from orcs_redis.errors import ConflictError
from orcs_redis.model import merge
from orcs_redis.model.filters import Filters
from orcs_redis.protocol import codec, commits, records, saving, sessions
from orcs_redis.protocol.baseline import set_baseline
from orcs_redis.protocol.commands import as_map
from orcs_redis.protocol.lists import Lists
from orcs_redis.protocol.reads import Load, Read, ReadNews, ReadStored, ReadTail
from orcs_redis.protocol.records import Records
from orcs_redis.protocol.saving import Saving
from orcs_redis.protocol.writes import Write

from .planting import Plant, after, before, replaced, write

__all__ = ["PLANTS_OF_PARTS"]


def _without(letters: bytes, beside: bytes = b"") -> Any:
    """Return a patch: writes leave groups of arguments out, where there are others beside them."""

    def make(original: Any) -> Any:
        def method(self: Write, namespace: Any, id: str, groups: Iterable[Any], **options: Any) -> None:
            groups = list(groups)
            found = b"".join(letter for letter, _ in groups)
            if not beside or any(letter in found for letter in beside):
                groups = [group for group in groups if group.letter not in letters]
            original(self, namespace, id, groups, **options)

        return method

    return replaced(Write, "__init__", make)


def _equal_changes_collide(original: Any) -> Any:
    def mine_holds(self: Any, name: str, of: Any) -> bool:
        if name != "updated_at_ms" and of.mine == of.theirs != of.base:
            self.conflicts.add(name)
        return bool(original(self, name, of))

    return mine_holds


def _save_what_is_gone(original: Any) -> Any:
    def save_changes(self: Saving[Any], asset: Any, known: Any, lease: Any) -> Any:
        try:
            return (yield from original(self, asset, known, lease))
        except ConflictError as error:
            if error.actual:
                raise
            return (yield from self._save_whole(asset, None, known, lease))

    return save_changes


def _unborn(original: Any) -> Any:
    return lambda self, *arguments: original(self, *arguments)._replace(born=0)


@contextlib.contextmanager
def _never_born() -> Iterator[None]:
    with replaced(ReadNews, "decode", _unborn)(), replaced(ReadStored, "_result", _unborn)():
        yield


def _believe_what_was_written(original: Any) -> Any:
    def follow_up(self: Saving[Any], asset: Any, mine: Any, since: int, objects: Any, *_: Any) -> Any:
        set_baseline(asset, mine, objects)
        yield from ()

    return follow_up


def _fail_to_follow_up(original: Any) -> Any:
    def follow_up(self: Saving[Any], asset: Any, mine: Any, since: int, objects: Any, new: Any, start: int) -> Any:
        yield ReadStored(self._namespace, self._codec, asset.id, start)
        yield from original(self, asset, mine, since, objects, new, start)

    return follow_up


def _answer_the_last_attempt(self: Write, *_: Any) -> None:
    self._unanswered = 1


def _acknowledge(self: Write, replies: Any) -> None:
    item = replies[-1][0] if type(replies[-1]) is list else None
    if type(item) is list and item[0] == b"OK" and self._token is not None:
        self._namespace.acknowledge(self._partition, self._token)


def _sewn(_: Read[Any], replies: Any) -> None:
    replies[2] = as_map(replies[0]).get(b".revision")


def _tail_sewn(_: ReadTail, replies: Any) -> None:
    replies[0] = replies[2][0]


def _ignoring_prefix(original: Any) -> Any:
    return lambda self, session, _, *rest: original(self, session, "", *rest)


def _all_present(keys: Any, values: Any) -> list[Any]:
    return [(key, value or b"gone") for key, value in zip(keys, values, strict=True)]


def _one_less(_: Any, self: Load[Any], namespace: Any, codec: Any, id: str, last: int | None = None) -> None:
    if last:
        self._start += 1


PLANTS_OF_PARTS = (
    # In the script
    write(
        "clobbers-parts", "a save of changes meets the parts that it changes as they were", "calm", 200,
        "if name ~= 'updated_at_ms' then return changed end", "",
    ),
    write(
        "conflicts-at-will", "parts that nobody else has changed are no reason to refuse", "calm", 200,
        "if (value and redis.sha1hex(value):sub(1, 16) or '') ~= ARGV[first.e + i - 1] then", "if true then",
    ),
    write(
        "cuts-others-turns", "a save that removes turns removes none that others have pushed", "calm", 400,
        "cuts_end and more > 0 or ", "",
    ),
    write(
        "pushes-twins", "a turn that is there already is not pushed by a save", "faults", 2000,
        "if brought_ids[id_of(others[i]) or false] then", "if false then",
    ),
    write(
        "puts-twins", "nor put in the place of another", "faults", 2500,
        "for i = first.y or 1, first.y and last.y or 0, 2 do brought_ids", "for i = 1, 0, 2 do brought_ids",
    ),
    write(
        "reshaped-unseen", "turns that were changed otherwise than by pushing are seen by a save", "calm", 400,
        "if reshaped > base or more < 0 or", "if",
    ),
    write(
        "born-unseen", "a session that was made anew is another one", "calm", 400,
        "if base > 0 and born > base then return {'CONFLICT', revision} end", "",
    ),
    write(
        "any-last-turn", "a commit meets the last turn that it names", "calm", 400,
        "if not turn or rest().id_of(turn) ~= ARGV[first.i] then", "if not turn then",
    ),
    write(
        "any-turn-replaced", "a turn is put in the place of the one with its id", "calm", 400,
        "if not turn or id_of(turn) ~= ARGV[first.v + 1] then", "if not turn then",
    ),
    write(
        "bits-forgotten", "what was made and placed is told again when the reply was lost", "faults", 400,
        "return {'OK', (struct_unpack('>I8', revision64)), 0, bits}",
        "return {'OK', (struct_unpack('>I8', revision64)), 0, ''}",
    ),
    write(
        "created-again", "who makes a session is told so, and nobody else", "calm", 200,
        "local bits = first.c and {not exists}", "local bits = first.c and {true}",
    ),
    write(
        "put-new-over-old", "of two who put a new record, the first has put it", "calm", 200,
        "if new then put", "do put",
    ),
    write(
        "unnamed-records", "names have the key of each record", "calm", 200,
        "redis.call('ZADD', names_key, '0', ARGV[i])", "",
    ),
    write(
        "drops-what-is-put", "a prefix that is dropped leaves what is put", "calm", 2000,
        "if not named[name] then named[name], dropped", "if true then named[name], dropped",
    ),
    write(
        "labels-stay", "the index of labels forgets those that a session has no more", "calm", 100,
        "if not new[member] then labelled[member] = false end", "",
    ),
    write(
        "labels-of-the-dead", "the index of labels has no session that was deleted", "calm", 200,
        "index_labels(id, tail, nil)", "",
    ),
    write(
        "born-again", ".born is the revision that made the session", "calm", 100,
        "if not exists then set('.born', revision) end", "set('.born', revision)",
    ),
    write(
        "reshaped-unnoted", ".reshaped is the revision that last changed turns otherwise than by pushing", "calm", 100,
        "if plan.reshapes or not exists then set", "if not exists then set",
    ),
    write(
        "parts-unnoted", ".parts is the revision that last changed parts", "calm", 100,
        "if parts then set('.parts'", "if not exists then set('.parts'",
    ),
    write(
        "miscounted", ".turns is the number of turns", "calm", 100,
        "return kept + (first.p and last.p - first.p + 1 or 0)", "return kept + (first.p and 1 or 0)",
    ),
    write(
        "forks-records", "a fork has the records only if that is asked for", "calm", 1000,
        "if first.O then", "if true then",
    ),
    # In the client
    Plant("base-unsaid", "a save says what it was made from", "calm", 400, patch=_without(b"ge", beside=b"su")),
    Plant("digests-unsaid", "a save says what its parts were", "calm", 400, patch=_without(b"e")),
    Plant("pops-blindly", "a pop removes what it returns", "calm", 400, patch=_without(b"g", beside=b"z")),
    Plant(
        "once-more", "of turns that come twice one is kept", "calm", 400,
        patch=lambda: mock.patch.object(sessions, "id_of", return_value=b""),
    ),
    Plant("once-blindly", "the same of two that come at once", "calm", 1500, patch=_without(b"g", beside=b"p")),
    Plant(
        "equal-changes-collide", "what both have changed equally is no conflict", "calm", 3000,
        patch=replaced(merge._Chooser, "mine_holds", _equal_changes_collide),
    ),
    Plant(
        "saves-what-is-gone", "a loaded session that was deleted is not saved", "calm", 400,
        patch=replaced(Saving, "_save_changes", _save_what_is_gone),
    ),
    Plant(
        "saves-into-another", "a session that was made anew is not saved to", "calm", 1000,
        patch=_never_born,
    ),
    Plant(
        "believes-its-write", "after a save an asset has what others have changed", "calm", 400,
        patch=replaced(Saving, "_follow_up", _believe_what_was_written),
    ),
    Plant(
        "fails-afterwards", "a save that was applied does not fail when nothing can be read after it", "faults", 2000,
        patch=replaced(Saving, "_follow_up", _fail_to_follow_up),
    ),
    Plant(
        "answered-by-nothing", "a cut of nothing is no answer for an attempt on its way", "abandoned", 2000,
        patch=before(Write, "decode", _answer_the_last_attempt),
    ),
    Plant(
        "idle-bars", "what is named to a write that finds nothing to do is not barred", "abandoned", 2500,
        patch=before(Write, "decode", _acknowledge),
    ),
    Plant(
        "labels-unsaid", "a save says what its labels are", "calm", 200,
        patch=lambda: mock.patch.object(codec, "labels_of", return_value={}),
    ),
    Plant(
        "names-unsaid", "a commit says what is indexed of its parts", "calm", 400,
        patch=lambda: mock.patch.object(commits, "_index_group", return_value=None),
    ),
    Plant(
        "partial-of-one-less", "a partial asset has the last turns", "calm", 400,
        patch=after(Load, "__init__", _one_less),
    ),
    Plant(
        "torn-loads", "a load is of one revision, whatever comes in between", "calm", 1000,
        patch=before(Read, "decode", _sewn),
    ),
    Plant(
        "torn-tails", "the same of the turns that are popped", "calm", 3000,
        patch=before(ReadTail, "decode", _tail_sewn),
    ),
    Plant(
        "lists-all", "a list has the sessions with its labels", "calm", 400,
        patch=replaced(Lists, "list", lambda original: lambda self, limit, _: original(self, limit, Filters())),
    ),
    Plant(
        "counts-all", "so a count counts them", "calm", 400,
        patch=replaced(Lists, "count", lambda original: lambda self, _: original(self, Filters())),
    ),
    Plant(
        "records-of-all", "a range of records has those with its prefix", "calm", 1000,
        patch=replaced(Records, "range", _ignoring_prefix),
    ),
    Plant(
        "gone-records", "a record that is absent, or dropped while a range is read, is left out", "calm", 100,
        patch=lambda: mock.patch.object(records, "_present", _all_present),
    ),
    Plant(
        "merges-nothing", "a save that meets others' changes keeps them", "calm", 1000,
        patch=lambda: mock.patch.object(saving, "merged", lambda _, asset, base, theirs: (asset, ())),
    ),
)  # fmt: skip
