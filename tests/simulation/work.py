"""What the workers of a world begin: each call of a store's method, and changes of the assets that they hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from orcs_redis import ConversationTurn, SessionAsset
from orcs_redis.model.filters import Filters
from orcs_redis.model.sections import ProjectContext, SkillConfig
from orcs_redis.protocol.commits import CommitArguments
from orcs_redis.protocol.request import Plan, single

from .driver import Flow, Writer
from .held import Held, Load, Refresh, Save, Update
from .intents import Append, Commit, Delete, Fork, Intent, Pop, Replace, Touch, Truncate
from .leases import Holding
from .readers import Count, Listing, Range, Values

if TYPE_CHECKING:
    from .world import World

__all__ = ["Work"]

_PARTS = ("metadata.a", "metadata.title", "metadata.labels", "skill_configs.x", "project_context")
_KEYS = ("a", "a/1", "a/2", "b")
_STAGED = 17  # turns: they don't go through the script


class Work:
    """What the workers of a world do, drawn from its seed."""

    def __init__(self, world: World) -> None:
        self.world, self.random = world, world.random
        self._turns = self._values = 0
        self._delivered: list[ConversationTurn] = []  # what comes twice

    def begin(self, writer: Writer, name: str, id: str) -> bool | None:
        """Begin something of this name; False if there is nothing to begin it with."""
        held = [holding for holding in self.world.holdings if holding.writer is writer and holding.held]
        under = self.random.choice(held) if held and self.random.random() < 0.6 else None
        if under is not None:
            id = under.id
        begun: bool | None = getattr(self, f"_begin_{name}")(writer, id, under)
        return begun

    def make(self, writer: Writer, id: str) -> None:
        """Save a new session."""
        made = self._new(id)
        self._save(writer, made, None, None)

    def append(
        self, writer: Writer, id: str, expected: int | None = None, under: Any = None, *, create: bool = False
    ) -> None:
        """Add turns to a session."""
        turns = [self._turn() for _ in range(self.random.choice((1, 1, 2)))]
        plan = single(lambda: writer.sessions.append(id, turns, expected, under, create=create))
        self._flow(writer, plan, Append(self.world, id, turns, create, once=False))

    # By the names that profiles give weights

    def _begin_append(self, writer: Writer, id: str, under: Any) -> None:
        self.append(writer, id, None, under)

    def _begin_append_if(self, writer: Writer, id: str, under: Any) -> None:
        self.append(writer, id, self._known(id), under, create=self.random.random() < 0.3)

    def _begin_append_create(self, writer: Writer, id: str, under: Any) -> None:
        self.append(writer, id, None, under, create=True)

    def _begin_once(self, writer: Writer, id: str, under: Any) -> None:
        if len(self._delivered) < 6 and self.random.random() < 0.5:
            self._delivered.append(self._turn())
        turns = self.random.sample(self._delivered, min(len(self._delivered), self.random.randint(1, 2)))
        create = self.random.random() < 0.5
        expected = self._known(id) if self.random.random() < 0.1 else None
        if turns:
            plan = writer.sessions.append_once(id, turns, expected, under, create=create)
            self._flow(writer, plan, Append(self.world, id, turns, create, once=True))

    def _begin_pop(self, writer: Writer, id: str, under: Any) -> None:
        count = self.random.choice((1, 1, 2, 20))
        expected = self._known(id) if self.random.random() < 0.1 else None
        self._flow(writer, writer.sessions.pop(id, count, expected, under), Pop(self.world, id, count))

    def _begin_truncate(self, writer: Writer, id: str, under: Any) -> None:
        length = self.random.randint(0, 4)
        expected = self._known(id) if self.random.random() < 0.1 else None
        plan = single(writer.sessions.truncate, id, length, expected, under)
        self._flow(writer, plan, Truncate(self.world, id, length))

    def _begin_replace(self, writer: Writer, id: str, under: Any) -> bool | None:
        stored = self.world.model.stored(id)
        if stored is None or not stored.turns:
            return False
        turn = self._turn()
        turn.id = stored.ids[self.random.randrange(len(stored.turns))]
        turn.content = self._unique()
        plan = writer.sessions.replace_turn(id, turn, None, under)
        self._flow(writer, plan, Replace(self.world, id, turn))
        return None

    def _begin_touch(self, writer: Writer, id: str, under: Any) -> None:
        self._flow(writer, single(writer.sessions.touch, id, None, under), Touch(self.world, id))

    def _begin_commit(self, writer: Writer, id: str, under: Any) -> None:
        self._commit(writer, id, under, self._arguments())

    def _begin_cut(self, writer: Writer, id: str, under: Any) -> None:
        length = self.random.choice((None, 0, 1, 20))
        arguments = CommitArguments(pop=1) if length is None else CommitArguments(truncate=length)
        self._commit(writer, id, under, arguments)

    def _begin_records(self, writer: Writer, id: str, under: Any) -> None:
        self._commit(writer, id, under, self._records(CommitArguments()))

    def _begin_fork(self, writer: Writer, id: str, under: Any) -> None:
        source = self.random.choice([other for other in self.world.ids if other != id])
        length = self.random.choice((None, None, 0, 1, 3))
        records = self.random.random() < 0.5
        plan = writer.sessions.fork(source, id, length, None, records=records)
        self._flow(writer, plan, Fork(self.world, source, id, length, records))

    def _begin_save(self, writer: Writer, id: str, under: Any) -> None:
        self._save(writer, self._new(id), self._known(id) if self.random.random() < 0.3 else None, under)

    def _begin_save_new(self, writer: Writer, id: str, under: Any) -> None:
        self._save(writer, self._new(id), 0, under)

    def _begin_save_known(self, writer: Writer, id: str, under: Any) -> bool | None:
        return self._save_held(writer, id, under, None)

    def _begin_shift(self, writer: Writer, id: str, under: Any) -> bool | None:
        """A history that is full: for each new turn the first one goes."""
        held = self._free(writer, id)
        if held is None or held.asset.history.skipped or not held.asset.history.turns:
            return False
        del held.asset.history.turns[0]
        held.asset.history.turns.append(self._turn())
        held.changed()
        self._save(writer, held, None, under)
        return None

    def _begin_save_if(self, writer: Writer, id: str, under: Any) -> bool | None:
        held = writer.assets.get(id)
        own = held is not None and self.random.random() < 0.8
        return self._save_held(writer, id, under, held.revision if own and held is not None else self._known(id))

    def _begin_save_big(self, writer: Writer, id: str, under: Any) -> None:
        held = self._free(writer, id) or self._new(id)
        if self.random.random() < 0.5 and not held.asset.history.skipped:
            held.asset.history.turns.clear()
        held.asset.history.turns += [self._turn() for _ in range(_STAGED)]
        held.changed()
        self._save(writer, held, None, under)

    def _begin_overwrite(self, writer: Writer, id: str, under: Any) -> bool | None:
        held = self._free(writer, id)
        if held is None or held.asset.history.skipped:
            return False
        self.edit(held)
        self._save(writer, held, None, under, overwrite=True)
        return None

    def _begin_edit(self, writer: Writer, id: str, under: Any) -> bool | None:
        if id not in writer.assets:
            return False
        self.edit(writer.assets[id])
        return None

    def _begin_refresh(self, writer: Writer, id: str, under: Any) -> bool | None:
        held = self._free(writer, id)
        if held is None or held.base is None:
            return False
        self._flow(writer, writer.saving.refresh(held.asset), Refresh(self.world, held))
        return None

    def _begin_update(self, writer: Writer, id: str, under: Any) -> None:
        title = self._value() if self.random.random() < 0.3 else None
        intent = Update(self.world, writer, id, self._turn, title)
        self._flow(writer, writer.saving.update(id, intent.change, under), intent)

    def _begin_load(self, writer: Writer, id: str, under: Any) -> None:
        last = self.random.choice((None, None, None, 0, 1, 3))
        self._flow(writer, single(writer.sessions.load, id, last), Load(self.world, writer, id, last))

    def _begin_read_records(self, writer: Writer, id: str, under: Any) -> None:
        if self.random.random() < 0.5:
            keys = self.random.sample(_KEYS, 3)
            self._flow(writer, writer.records.get(id, keys), Values(self.world, id, keys))
            return
        prefix, limit = self.random.choice(("", "a", "a/")), self.random.choice((None, None, 0, 1, 2))
        reverse = self.random.random() < 0.5
        plan = writer.records.range(id, prefix, None, None, limit, reverse)
        self._flow(writer, plan, Range(self.world, id, prefix, limit, reverse))

    def _begin_list(self, writer: Writer, id: str, under: Any) -> None:
        rng = self.random
        labels = {label: rng.choice(("x", "y")) for label in rng.sample(("l1", "l2"), rng.choice((0, 1, 1, 2)))}
        path = rng.choice((None, None, "/p", "same"))
        filters = Filters(labels=labels, project_path=path)
        if rng.random() < 0.5:
            self._flow(writer, writer.lists.list(rng.choice((None, 100)), filters), Listing(self.world, labels, path))
        else:
            self._flow(writer, writer.lists.count(filters), Count(self.world, labels, path))

    def _begin_delete(self, writer: Writer, id: str, under: Any) -> None:
        self._flow(writer, single(writer.sessions.delete, id, None, under), Delete(self.world, id))

    def _begin_delete_if(self, writer: Writer, id: str, under: Any) -> None:
        self._flow(writer, single(writer.sessions.delete, id, self._known(id), under), Delete(self.world, id))

    def _begin_lease(self, writer: Writer, id: str, under: Any) -> None:
        ttl = self.random.choice((0.3, 2.0, 10.0))
        self.world.holdings.append(Holding(self.world, writer, id, ttl, self.random.choice((0.0, 3.0))))

    def _begin_release(self, writer: Writer, id: str, under: Any) -> bool | None:
        held = [holding for holding in self.world.holdings if holding.writer is writer and holding.held]
        if not held:
            return False
        self.random.choice(held).release()
        return None

    def _begin_changes(self, writer: Writer, id: str, under: Any) -> None:
        since = writer.changes.encode([self.random.randint(0, len(log)) for log in self.world.model.logs])
        self._flow(writer, writer.changes.changes(since, self.random.choice((1, 2, 100))), Intent(self.world, id))

    # Their parts

    def _flow(self, writer: Writer, plan: Plan[Any], intent: Intent) -> None:
        Flow(self.world, writer, plan, lambda _: None, intent)

    def _turn(self) -> ConversationTurn:
        self._turns += 1
        turn = ConversationTurn.user("t")
        turn.id = f"t{self._turns}"
        return turn

    def _value(self) -> str:
        if self.random.random() < 0.25:
            return "same"  # as somebody else's
        return self._unique()

    def _unique(self) -> str:
        self._values += 1
        return f"v{self._values}"

    def _known(self, id: str) -> int:
        """Return a revision that the session has or had."""
        records = [record for record in self.world.model.records[-9:] if record.id == id]
        return self.random.choice([record.outcome for record in records if type(record.outcome) is int] or [1])

    def _new(self, id: str) -> Held:
        asset = SessionAsset(id=id)
        asset.history.turns.append(self._turn())
        held = Held(self.world, asset)
        if self.random.random() < 0.5:
            self.edit(held)
        return held

    def _free(self, writer: Writer, id: str) -> Held | None:
        """Return the asset that a writer holds, if nothing is done with it; or rarely, if something is."""
        held = writer.assets.get(id)
        if held is None or (held.busy and self.random.random() < 0.8):
            return None
        held.muddled |= held.busy > 0
        return held

    def _save_held(self, writer: Writer, id: str, under: Any, expected: int | None) -> bool | None:
        held = self._free(writer, id)
        if held is None:
            held = self._new(id)
        elif held.asset.history.skipped and expected is not None:
            return False  # only its changes can be saved
        elif self.random.random() < 0.8:
            self.edit(held)
        self._save(writer, held, expected, under)
        return None

    def _save(self, writer: Writer, held: Held, expected: int | None, under: Any, *, overwrite: bool = False) -> None:
        writer.assets[held.asset.id] = held
        intent = Save(self.world, held, expected, overwrite)
        self._flow(writer, writer.saving.save(held.asset, expected, under, overwrite=overwrite), intent)

    def edit(self, held: Held) -> None:
        """Change an asset: a part or two, or its turns."""
        for _ in range(self.random.choice((1, 1, 2))):
            if self.random.random() < 0.5:
                self._edit_part(held.asset)
            else:
                self._edit_turns(held)
        held.changed()

    def _edit_part(self, asset: SessionAsset) -> None:
        name = self.random.choice(_PARTS)
        gone = self.random.random() < 0.2
        section, _, key = name.partition(".")
        if name == "project_context":
            field = self.random.choice(("name", "root_path"))
            setattr(asset.project_context, field, None if gone else self._value())
        elif gone:
            getattr(asset, section).pop(key, None)
        else:
            getattr(asset, section)[key] = self._part(name)
        if self.random.random() < 0.3:
            asset.touch()

    def _edit_turns(self, held: Held) -> None:
        turns, rng = held.asset.history.turns, self.random
        known = [turn for turn in turns if held.base is None or turn.id in dict(held.base.turns)]
        choice = rng.random()
        if choice < 0.5 or not known:
            turns += [self._turn() for _ in range(rng.choice((1, 1, 2)))]
        elif choice < 0.7:
            rng.choice(known).content = self._unique()
        elif held.asset.history.skipped:
            turns.append(self._turn())  # none of it can be removed
        elif choice < 0.85:
            del turns[0]
        else:
            del turns[-1]

    def _part(self, name: str) -> Any:
        rng = self.random
        if name == "metadata.labels":
            if rng.random() < 0.1:
                return rng.choice(["no labels", {str(n): "x" for n in range(9)}, {"l1": ""}])
            return {label: rng.choice(("x", "y")) for label in rng.sample(("l1", "l2", "l3"), rng.randint(0, 3))}
        if name == "skill_configs.x":
            return SkillConfig(skill_id="x", params={"value": self._value()})
        if name == "project_context":
            return ProjectContext(name=rng.choice((None, self._value())), root_path=rng.choice((None, "/p", "/q")))
        return self._value()

    def _commit(self, writer: Writer, id: str, under: Any, arguments: CommitArguments) -> None:
        create, rng = self.random.random() < 0.3, self.random
        expected = self._known(id) if rng.random() < 0.1 else 0 if rng.random() < 0.05 else None
        stored = self.world.model.stored(id)
        last = stored.ids[-1] if stored is not None and stored.turns and rng.random() < 0.2 else None
        plan = writer.sessions.commit(id, arguments, expected, last, under, create=create)
        self._flow(writer, plan, Commit(self.world, id, arguments, create, expected, last))

    def _arguments(self) -> CommitArguments:
        rng = self.random
        names = rng.sample(_PARTS, rng.choice((0, 1, 1, 2)))
        unset = [name for name in names if name not in ("project_context",) and rng.random() < 0.3]
        arguments = CommitArguments(set={name: self._part(name) for name in names if name not in unset}, unset=unset)
        if rng.random() < 0.1:
            moment = self.world.clock.milliseconds() + rng.randint(-2000, 2000)
            parts = {**(arguments.set or {}), rng.choice(("updated_at_ms", "created_at_ms")): moment}
            arguments = arguments._replace(set=parts)
        if rng.random() < 0.3:
            arguments = arguments._replace(append=[self._turn() for _ in range(rng.choice((1, 2)))])
        if rng.random() < 0.15:
            arguments = arguments._replace(pop=rng.randint(1, 3))
        elif rng.random() < 0.1:
            arguments = arguments._replace(truncate=rng.randint(0, 3))
        if "metadata.labels" not in names and rng.random() < 0.3:
            some = rng.sample(("l1", "l2", "l3"), rng.randint(1, 2))
            arguments = arguments._replace(labels={label: rng.choice(("x", "y", None)) for label in some})
        if rng.random() < 0.2 or not any(arguments):
            arguments = self._records(arguments)
        return arguments

    def _records(self, arguments: CommitArguments) -> CommitArguments:
        rng = self.random
        keys = rng.sample(_KEYS, rng.randint(1, 3))
        kinds = {key: rng.choice(("put", "put_new", "put_new", "drop")) for key in keys}
        values = {key: self._value().encode() for key in keys}
        drop = [key for key in keys if kinds[key] == "drop"] + (["a*"] if rng.random() < 0.1 else [])
        return arguments._replace(
            put={key: values[key] for key in keys if kinds[key] == "put"},
            put_new={key: values[key] for key in keys if kinds[key] == "put_new"},
            drop=drop,
        )
