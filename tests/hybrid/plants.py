"""Planted faults: at least one for each rule. A judge that does not catch one judges nothing."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

from orcs_redis.model import merge as merging
from orcs_redis.model.meta import SyncState
from orcs_redis.protocol.baseline import baseline_of
from orcs_redis.protocol.reads import Mark
from orcs_redis.stores.hybrid import exchange, files, installing, journal, local, planner, shared
from orcs_redis.stores.hybrid.planner import Act, Base, Step

from .machine import acting

__all__ = ["PLANTS", "Plant"]

Patch = Callable[[], contextlib.AbstractContextManager[Any]]


class Plant(NamedTuple):
    """A fault, and within how many runs the judge surely finds it."""

    name: str
    breaks: str  # in words
    runs: int
    patch: Patch


def _replaced(target: Any, name: str, new: Any) -> Patch:
    return lambda: mock.patch.object(target, name, new)


def _planned(change: Callable[[Step[Any], Any, Any, Any], Step[Any]], **forced: Any) -> Patch:
    """Return a patch: what is planned is changed, knowing base and both sides."""
    original = planner.plan

    def plan(base: Any, here: Any, there: Any, **known: Any) -> Step[Any]:
        return change(original(base, here, there, **(known | forced)), base, here, there)

    return _replaced(installing, "plan", plan)


def _merged(change: Callable[[Any, Any, Any], Any]) -> Patch:
    """Return a patch: a merge's result is changed, knowing both sides."""
    original = merging.merge

    def merge(base: Any, here: Any, there: Any, **known: Any) -> Any:
        result = original(base, here, there, **known)
        change(result.asset, here, there)
        return result

    return _replaced(planner, "merge", merge)


def _resurrect(step: Step[Any], _: Any, here: Any, __: Any) -> Step[Any]:
    if step.act is Act.DELETE_HERE:
        return Step(SyncState.LOCAL_ONLY, Act.INSTALL, here, write_there=True, revives=True)
    return step


def _delete_edited(step: Step[Any], *_: Any) -> Step[Any]:
    if not step.revives:
        return step
    return Step(step.state, Act.DELETE_HERE if step.write_there else Act.DELETE_THERE, keep=("here",))


def _mine(step: Step[Any], _: Any, here: Any, there: Any) -> Step[Any]:
    if step.write_here and step.write_there:
        return step._replace(version=here, write_here=False)
    return step


def _sort(asset: Any, *_: Any) -> None:
    asset.history.turns.sort(key=lambda turn: turn.timestamp_ms)


def _ours_first(asset: Any, here: Any, _: Any) -> None:
    own = {turn.id for turn in here.history.turns}
    asset.history.turns.sort(key=lambda turn: turn.id not in own)


def _send_again(step: Step[Any], _: Any, here: Any, __: Any) -> Step[Any]:
    if step.state is SyncState.SYNCED:
        return Step(step.state, Act.INSTALL, here, write_there=True)
    return step


def _note_first(original: Any) -> Any:
    def finish(self: Any, round: Any, items: Any) -> Any:
        pulls = [item for item in items if item.step.write_here and not item.step.write_there]
        self._journal.note(journal.Notes({item.id: installing._common(item) for item in pulls}))
        return original(self, round, items)

    return finish


def _base_first(original: Any) -> Any:
    def prepare(self: Any, round: Any, items: Any) -> Any:
        ready = original(self, round, items)
        notes = {}
        for item in ready:
            if item.step.write_there and item.mark is not None:
                version, mark = item.version, item.mark
                base = Base(version.parts, version.digest, mark.revision, mark.operation_id)
                notes[item.id] = journal.Record.of(base, None, item.record.row)
        self._journal.note(journal.Notes(notes))
        return ready

    return prepare


def _without_twins(original: Any) -> Any:
    def aligned(old: Any, new: Any, *by_key: Any) -> Any:
        return {} if by_key == (False,) else original(old, new, *by_key)

    return aligned


@contextlib.contextmanager
def _doubling() -> Iterator[None]:
    with (
        mock.patch.object(installing, "caught_up", lambda base, *_, **__: base),
        mock.patch.object(merging, "_aligned", _without_twins(merging._aligned)),
    ):
        yield


def _pulls_count(original: Any) -> Any:
    def caught_up(base: Any, pending: Any, there: Any, **known: Any) -> Any:
        if pending is not None and pending.mine is None and isinstance(there, planner.Side):
            return Base(there.parts, there.digest, pending.revision, pending.operation)
        return original(base, pending, there, **known)

    return caught_up


def _put_blindly(self: Any, asset: Any, revision: int) -> Any:
    yield from self._core.saving.save(asset, overwrite=True)
    written = baseline_of(asset, self._namespace.incarnation)
    assert written is not None
    return Mark(written.revision, written.operation_id)


def _remove_blindly(self: Any, id: str, revision: int) -> Any:
    yield self._core.sessions.delete(id, None, None)


def _rename(self: Any, new: Any, file: Any, is_first: bool) -> bool:
    if is_first:
        exchange.move(new, file)
    else:
        machine = acting()
        machine.world.interlude_here(machine, file)
        os.replace(new, file)  # noqa: PTH105  # as the product does
    return False


def _all_synced(**known: Any) -> Any:
    found = planner.standing(**known)
    return found._replace(state=SyncState.SYNCED) if known["based"] and known["here"] else found


def _one_behind(original: Any) -> Any:
    known: dict[tuple[Any, str], Any] = {}

    def load(self: Any, id: str) -> Any:
        found, old = original(self, id), known.pop((self.files.path, id), None)
        if old is None:
            known[self.files.path, id] = found
        return old or found

    return load


def _save_over(self: Any, id: str, data: bytes, known: Any, found: Any) -> Any:
    return self.decode(id, data)


_ALL = (
    Plant("last-writer-wins", "a part that both changed is a conflict, or its loser is kept", 100,
          _planned(lambda step, *_: step._replace(keep=()), prefer="local")),
    Plant("whole-sessions", "sessions are merged by parts", 40, _planned(_mine)),
    Plant("resurrected-deletions", "what was deleted there is deleted here", 100,
          _planned(_resurrect)),
    Plant("deletion-beats-edit", "an edit beats a deletion", 100, _planned(_delete_edited)),
    Plant("order-by-time", "what is new here goes after what is there", 100, _merged(_sort)),
    Plant("ours-first", "what is there keeps its place", 100, _merged(_ours_first)),
    Plant("pull-notes-first", "a pull is noted when it is written", 200,
          lambda: mock.patch.object(installing.Installer, "_finish", _note_first(installing.Installer._finish))),
    Plant("base-before-push", "a base is noted when the push has arrived", 200,
          lambda: mock.patch.object(installing.Installer, "_prepare", _base_first(installing.Installer._prepare))),
    Plant("pull-counts-as-seen", "what is noted of a pull was not seen", 200,
          lambda: mock.patch.object(installing, "caught_up", _pulls_count(planner.caught_up))),
    Plant("never-caught-up", "what was sent and arrived is no edit of others", 200,
          _replaced(installing, "caught_up", lambda base, *_, **__: base)),
    Plant("doubled", "a turn that is on both sides is one", 200, _doubling),
    Plant("stale-writers-believed", "turns that a file lacks come back", 100,
          lambda: mock.patch.multiple(planner, lacking_turns=lambda *_: [])),
    Plant("removals-forgotten", "turns that are removed through the API stay away", 100,
          _replaced(journal.Journal, "note_removal", lambda *_, **__: None)),
    Plant("nothing-kept", "what loses is kept", 300, _planned(lambda step, *_: step._replace(keep=()))),
    Plant("push-unbound", "a push is bound to the revision that was seen", 200,
          _replaced(shared.Shared, "put", _put_blindly)),
    Plant("deletion-unbound", "a deletion is bound to the revision that was seen", 400,
          _replaced(shared.Shared, "remove", _remove_blindly)),
    Plant("rename-unbound", "a file is replaced if it is what was seen", 300,
          _replaced(files.Files, "_put", _rename)),
    Plant("everything-collides", "a conflict is of one part", 40,
          _planned(lambda step, *_: step, merging=False)),
    Plant("restless", "what is in step is left alone", 40, _planned(_send_again)),
    Plant("all-synced", "states are true", 100, _replaced(local, "standing", _all_synced)),
    Plant("old-reads", "who has written reads that", 40,
          lambda: mock.patch.object(local.Local, "load", _one_behind(local.Local.load))),
    Plant("local-saves-overwrite", "a save applies its changes to the file as it is", 100,
          _replaced(local.Local, "_merge", _save_over)),
    Plant("bases-survive-a-wipe", "after a wipe nothing is deleted", 1000,
          _replaced(journal.Journal, "forget_bases", lambda *_: None)),
)  # fmt: skip
PLANTS = {plant.name: plant for plant in _ALL}
