"""What workers do to a few sessions that all of them edit at once: whatever changes a session by its parts.

These histories stay short, so that all that is seen of them goes into the log. Arguments are those of model.py.
"""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

from orcs_redis import ConversationTurn, SessionAsset, SessionMeta
from orcs_redis.model.sections import ProjectContext
from orcs_redis.protocol.baseline import Baseline, baseline_of

from .recorder import Recorder, Recording, told_revisions

__all__ = ["FORKS", "SHARED", "Editing", "listed", "snapshot"]

SHARED: Final = tuple(f"shared-{n}" for n in range(4))
FORKS: Final = tuple(f"fork-{n}" for n in range(3))
SHORT = 30  # turns
NAME: Final = "project_context.name"
VALUES: Final = ("metadata.a", "metadata.b", "metadata.c", NAME)
KEYS: Final = ("r/0", "r/1", "r/2", "s/0", "s/1", "t")
LABELS: Final = ("user", "place")


def snapshot(asset: SessionAsset) -> dict[str, Any]:
    """Return what the log tells of an asset: its turns as id and writer, its parts by name."""
    parts = {f"metadata.{key}": value for key, value in asset.metadata.items()}
    if asset.project_context.name is not None:
        parts[NAME] = asset.project_context.name
    turns = [[turn.id, turn.content.removeprefix("of ")] for turn in asset.history.turns]
    return {"turns": turns, "parts": parts, "skipped": asset.history.skipped}


def listed(meta: SessionMeta) -> list[Any]:
    """Return what the log tells of a session in a list."""
    listed = [meta.id, meta.revision, meta.turn_count]
    return [*listed, meta.name, meta.labels] if meta.id in SHARED + FORKS else listed


def turn_of(id: str, uid: str) -> ConversationTurn:
    """Return a turn of this id whose content says who wrote it."""
    turn = ConversationTurn.user(f"of {uid}")
    turn.id, turn.timestamp_ms = id, 1  # delivered again it is the same
    return turn


class Editing(Recording):
    """Edits a few sessions, as others do at the same time."""

    def __init__(self, store: Any, log: Recorder, seed: int) -> None:
        super().__init__(store, log, seed)
        self._seen: dict[str, list[str]] = {}  # ids of turns, by session
        self._sent: dict[str, list[list[list[str]]]] = {}  # turns that may be delivered again

    async def edit(self) -> None:
        """Do one thing to one of the sessions."""
        session = self._rng.choice(SHARED + FORKS if self._rng.random() < 0.3 else SHARED)
        actions: dict[Callable[[str], Awaitable[Any]], int] = {
            self._commit: 20, self._push: 14, self._pop: 10, self._replace: 5, self._read: 6, self._hold: 16,
            self._amend: 6, self._records: 4, self._fork: 3, self._tail: 4, self._labelled: 4, self._make: 3,
            self._remove: 2,
        }  # fmt: skip
        await self._rng.choices(list(actions), list(actions.values()))[0](session)

    async def _written(self, kind: str, session: str, uid: str, call: Callable[[], Awaitable[Any]], **args: Any) -> Any:
        """Log a write, the revision that it made, or that it made none; return what it returned."""
        answer = None
        async with self._recorded(uid, kind, session, **args) as result:
            with told_revisions() as revisions:
                answer = await call()
            result |= {"revision": revisions[-1]} if revisions else {"idle": True}
            if kind == "commit" and hasattr(answer, "placed"):
                result |= {"created": answer.created, "placed": answer.placed}
            if args.get("by") == "pop":
                result["popped"] = [turn.id for turn in answer]
            elif isinstance(answer, int) and not revisions:
                result["seen"] = answer
        if result["outcome"] == "NotFoundError" and kind != "replace" and self._rng.random() < 0.5:
            await self._make(session)
        return answer

    # Without loading

    async def _commit(self, session: str) -> None:
        uid = self._log.uid()
        args = self._changes(uid)
        options = {name: value for name, value in args.items() if name not in ("turns", "set")}
        options["append"] = [turn_of(*turn) for turn in args.get("turns", ())]
        options["set"] = _settings(args.get("set", {}))
        for name in ("put", "put_new"):
            options[name] = {key: value.encode() for key, value in args.get(name, {}).items()}
        base = self._known.get(session) if self._rng.random() < 0.05 else None
        seen = self._seen.get(session)
        if seen and self._rng.random() < 0.1:
            options["if_last"] = args["if_last"] = seen[-1]
        await self._written(
            "commit", session, uid, lambda: self._store.commit(session, if_revision=base, **options), base=base, **args
        )

    def _changes(self, uid: str) -> dict[str, Any]:
        """Draw what a commit changes."""
        rng = self._rng
        args: dict[str, Any] = {"create": True} if rng.random() < 0.1 else {}
        keys = rng.sample(KEYS, 4)
        for kind in rng.sample(("turns", "cut", "set", "unset", "put", "put_new", "drop", "labels"), rng.randint(1, 3)):
            match kind:
                case "turns":
                    args["turns"] = [[f"{uid}.{n}", uid] for n in range(rng.randint(1, 2))]
                case "cut":
                    args |= {"truncate": rng.randint(0, SHORT)} if rng.random() < 0.4 else {"pop": rng.randint(1, 3)}
                case "set":
                    args["set"] = dict.fromkeys(rng.sample(VALUES[1:], rng.randint(1, 2)), uid)
                case "unset":
                    args["unset"] = [VALUES[0]]
                case "put":
                    args["put"] = {keys[0]: uid}
                case "put_new":
                    args["put_new"] = dict.fromkeys(keys[1:3], uid)
                case "drop":
                    args["drop"] = [keys[3]] if rng.random() < 0.5 else ["r/*"]
                case "labels":
                    args["labels"] = {rng.choice(LABELS): rng.choice((uid, f"u{rng.randrange(3)}", None))}
        return args

    async def _push(self, session: str) -> None:
        """Append, or deliver once more what was sent before."""
        uid, sent = self._log.uid(), self._sent.setdefault(session, [])
        turns: list[Any] = [[f"{uid}.{n}", uid] for n in range(self._rng.randint(1, 3))]
        once = self._rng.random() < 0.5
        if once and sent and self._rng.random() < 0.7:
            turns = sent.pop(self._rng.randrange(len(sent)))
        sent.append(turns)
        del sent[:-5]
        create = self._rng.random() < 0.1
        made = [turn_of(*turn) for turn in turns]
        call = lambda: self._store.append(session, *made, once=once, create=create)  # noqa: E731  # called at once
        await self._written("commit", session, uid, call, by="append", turns=turns, once=once, create=create)

    async def _pop(self, session: str) -> None:
        uid, count = self._log.uid(), self._rng.choice((1, 1, 2, 3))
        if self._rng.random() < 0.7:
            await self._written("commit", session, uid, lambda: self._store.pop(session, count), by="pop", pop=count)
        elif self._rng.random() < 0.8:
            length = self._rng.randint(0, SHORT)
            await self._written(
                "commit", session, uid, lambda: self._store.truncate(session, length), by="truncate", truncate=length
            )
        else:
            await self._written("commit", session, uid, lambda: self._store.touch(session), by="touch")

    async def _replace(self, session: str) -> None:
        seen = self._seen.get(session)
        if seen:
            uid, id = self._log.uid(), self._rng.choice(seen)
            call = lambda: self._store.replace_turn(session, turn_of(id, uid))  # noqa: E731  # called at once
            await self._written("replace", session, uid, call, replace=[id, uid])

    async def _make(self, session: str) -> None:
        uid, asset = self._log.uid(), SessionAsset(id=session)
        asset.metadata = {"a": uid}
        for n in range(self._rng.choice((0, 2, 20))):
            asset.add_turn(turn_of(f"{uid}.{n}", uid))
        kind, base = ("put", None) if self._rng.random() < 0.15 else ("create", 0)
        call = lambda: self._store.save(asset, if_revision=base)  # noqa: E731  # called at once
        await self._written(kind, session, uid, call, base=base, whole=snapshot(asset))

    async def _remove(self, session: str) -> None:
        uid = self._log.uid()
        await self._written("delete", session, uid, lambda: self._store.delete(session), base=None)
        if self._rng.random() < 0.8:
            await self._make(session)

    async def _fork(self, session: str) -> None:
        source, session = self._rng.choice(SHARED), self._rng.choice(FORKS)
        if self._rng.random() < 0.5:
            await self._written("delete", session, self._log.uid(), lambda: self._store.delete(session), base=None)
        length = self._rng.choice((None, self._rng.randint(0, SHORT)))
        records = self._rng.random() < 0.5
        call = lambda: self._store.fork(source, session, length=length, records=records)  # noqa: E731  # called at once
        await self._written("fork", session, self._log.uid(), call, source=source, length=length, records=records)

    # With what was loaded

    async def _amend(self, session: str) -> None:
        """Update: count, set a part, perhaps add a turn."""
        uid = self._log.uid()
        turns = [[f"{uid}.0", uid]] if self._rng.random() < 0.3 else []
        settings = {self._rng.choice(VALUES): uid}
        counted: list[int] = []

        def change(asset: SessionAsset) -> None:
            counted.append(asset.metadata.get("counter", 0) + 1)
            asset.metadata["counter"] = counted[-1]
            _change(asset, settings)
            for turn in turns:
                asset.add_turn(turn_of(*turn))

        async with self._recorded(uid, "amend", session, turns=turns, set=settings) as result:
            with told_revisions() as revisions:
                await self._store.update(session, change)
            result |= {"revision": revisions[-1], "counter": counted[-1]}

    async def _hold(self, session: str) -> None:
        """Load an asset, change it, save and refresh it, while others go on."""
        chain = self._log.uid()
        found: list[SessionAsset] = []
        async with self._recorded(chain, "read", session) as result:
            last = self._rng.randint(1, 8) if self._rng.random() < 0.25 else None
            asset = await self._store.load(session, last=last)
            found.append(asset)
            result |= {"revision": self._baseline_of(asset).revision, **snapshot(asset)}
            self._note(session, asset)
        for asset in found:
            for _ in range(self._rng.randint(1, 4)):
                for _ in range(self._rng.choice((0, 1, 1, 2))):
                    self._change(asset)
                await asyncio.sleep(self._rng.choice((0, self._rng.uniform(0, 0.05))))
                if self._rng.random() < 0.15:  # as if another process went on with it
                    asset = pickle.loads(pickle.dumps(asset))
                if not await self._keep(asset, chain):
                    break

    async def _keep(self, asset: SessionAsset, chain: str) -> bool:
        """Save or refresh an asset; return whether to go on with it."""
        refreshes = self._rng.random() < 0.35
        args = {"chain": chain, "mine": snapshot(asset)}
        uid, kind = self._log.uid(), "refresh" if refreshes else "merge"
        async with self._recorded(uid, kind, asset.id, **args) as result:
            with told_revisions() as revisions:
                answer = await (self._store.refresh(asset) if refreshes else self._store.save(asset))
            if revisions:
                result["revision"] = revisions[-1]
            elif refreshes:
                result["revision"] = answer
            else:
                result |= {"idle": True, "seen": answer}
        if result["outcome"] in ("Interrupted", "Swallowed", "NotFoundError"):
            return False
        # What it is now, of which revision; after a failure it must be as it was.
        stored = self._baseline_of(asset)
        self._log.note(uid, after=snapshot(asset), of=stored.revision, behind=stored.conflicting)
        self._note(asset.id, asset)
        if result.get("actual") == 0:
            return False
        return result["outcome"] == "ok" or self._rng.random() < 0.7

    def _baseline_of(self, asset: SessionAsset) -> Baseline:
        stored = baseline_of(asset, self._incarnation)
        assert stored is not None
        return stored

    def _change(self, asset: SessionAsset) -> None:
        """Change an asset here."""
        uid, turns = self._log.uid(), asset.history.turns
        draw = self._rng.random()
        if draw < 0.3 or (draw < 0.55 and not turns):
            asset.add_turn(turn_of(f"{uid}.0", uid))
        elif draw < 0.45:
            n = self._rng.randrange(len(turns))
            turns[n] = turn_of(turns[n].id, uid)
        elif draw < 0.55 and not asset.history.skipped:
            del turns[self._rng.randrange(len(turns))]
        elif draw < 0.9:
            _change(asset, {self._rng.choice(VALUES): uid})
        elif draw < 0.95:
            asset.metadata.pop(self._rng.choice("abc"), None)
        else:
            asset.metadata["labels"] = {self._rng.choice(LABELS): uid}

    # Reads

    async def _read(self, session: str) -> None:
        async with self._recorded(self._log.uid(), "read", session) as result:
            asset, revision = await self._store.load_versioned(session)
            self._note(session, asset)
            result |= {"revision": revision, **snapshot(asset)}

    async def _tail(self, session: str) -> None:
        last = self._rng.randint(1, 12)
        async with self._recorded(self._log.uid(), "tail", session, last=last) as result:
            result["ids"] = [turn.id for turn in await self._store.turns(session, -last)]

    async def _records(self, session: str) -> None:
        if self._rng.random() < 0.5:
            prefix = self._rng.choice(("", "r/", "s/"))
            async with self._recorded(self._log.uid(), "records", session, prefix=prefix) as result:
                found: Mapping[str, bytes] = dict(await self._store.records(session, prefix))
                result["records"] = {key: data.decode() for key, data in found.items()}
        else:
            async with self._recorded(self._log.uid(), "get_records", session) as result:
                found = await self._store.get_records(session, KEYS)
                result["records"] = {key: data.decode() for key, data in found.items()}

    async def _labelled(self, _: str) -> None:
        label, value = self._rng.choice(LABELS), f"u{self._rng.randrange(3)}"
        async with self._recorded(self._log.uid(), "labelled", "", label=label, value=value) as result:
            result["items"] = [*map(listed, await self._store.list(labels={label: value}))]

    def _note(self, session: str, asset: SessionAsset) -> None:
        self._seen[session] = [turn.id for turn in asset.history.turns]


def _settings(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Return parts as a commit sets them: of the project, the section that it is in."""
    return {
        name.partition(".")[0] if name == NAME else name: ProjectContext(name=value) if name == NAME else value
        for name, value in parts.items()
    }


def _change(asset: SessionAsset, parts: Mapping[str, Any]) -> None:
    for name, value in parts.items():
        if name == NAME:
            asset.project_context.name = value
        else:
            asset.metadata[name.partition(".")[2]] = value
