"""A session: orcs' session schema, version 1, and its JSON.

Times are milliseconds since 1970, UTC.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from functools import cache
from os import PathLike, fspath
from typing import Any, Final, NamedTuple, Self, TypeVar

import msgspec

from ..errors import CorruptSessionError, SerializationError, VersionIncompatibleError
from .encoding import attempt, dump_json, encode, f32_text, named, pack, parse_json, parse_written, repeated_field
from .ids import MAX_ID_BYTES
from .raw import content_of, embedded, extracted, raw_fault
from .schema import MAX_TIME_MS, U32, U64, FreeForm, Noted, initial
from .sections import (
    CommandGrant,
    ComponentSnapshot,
    ConversationHistory,
    ConversationTurn,
    ProjectContext,
    SkillConfig,
    UserPreferences,
    new_id,
    now_ms,
)

__all__ = ["SESSION_VERSION", "SessionAsset", "check_asset", "check_version", "json_fields", "to_datetime"]

A = TypeVar("A", bound="SessionAsset")

SESSION_VERSION: Final = 1

_UNIX_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


def to_datetime(ms: int) -> datetime:
    """Return an aware datetime, at most the end of the year 9999."""
    return _UNIX_EPOCH + timedelta(milliseconds=min(ms, MAX_TIME_MS))


class SessionAsset(Noted, kw_only=True):
    """A session: everything that is kept between runs.

    A subclass may add fields; those with a default may be missing in what is decoded. ``extra`` holds the
    top-level fields that are not known here, as a newer orcs may write; in JSON they stand beside the others.
    """

    id: str = initial(new_id)
    version: U32 = initial(lambda: SESSION_VERSION)
    created_at_ms: U64 = initial(now_ms)
    updated_at_ms: U64 = initial(now_ms)
    history: ConversationHistory = initial(ConversationHistory)
    preferences: UserPreferences = initial(UserPreferences)
    project_context: ProjectContext = initial(ProjectContext)
    skill_configs: dict[str, SkillConfig] = initial(dict)
    component_snapshots: dict[str, ComponentSnapshot] = msgspec.field(default_factory=dict)
    granted_commands: list[CommandGrant] = msgspec.field(default_factory=list)
    metadata: FreeForm = initial(dict)
    extra: FreeForm = msgspec.field(default_factory=dict)

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return [("id", self.id), ("turns", len(self.history))]

    @classmethod
    def new(cls) -> Self:
        """Make an empty session with a fresh UUID."""
        now = now_ms()
        return cls(created_at_ms=now, updated_at_ms=now)

    @classmethod
    def for_project(cls, path: str | PathLike[str]) -> Self:
        """Make an empty session for the project at ``path``."""
        asset = cls.new()
        asset.project_context.root_path = fspath(path)
        return asset

    def touch(self) -> None:
        """Set the time of the last update to now."""
        self.updated_at_ms = now_ms()

    def add_turn(self, turn: ConversationTurn) -> None:
        """Append a turn."""
        self.history.turns.append(turn)
        self.touch()

    def set_skill_config(self, skill_id: str, config: SkillConfig) -> None:
        """Add or replace the configuration of a skill."""
        self.skill_configs[skill_id] = config
        self.touch()

    def save_snapshot(self, snapshot: ComponentSnapshot) -> None:
        """Add or replace the snapshot of its component."""
        self.component_snapshots[snapshot.component_fqn] = snapshot
        self.touch()

    def get_snapshot(self, fqn: str) -> ComponentSnapshot | None:
        """Return the snapshot of the component of this fully qualified name, if there is one."""
        return self.component_snapshots.get(fqn)

    def remove_snapshot(self, fqn: str) -> ComponentSnapshot | None:
        """Remove a component's snapshot and return it."""
        snapshot = self.component_snapshots.pop(fqn, None)
        if snapshot is not None:
            self.touch()
        return snapshot

    def clear_snapshots(self) -> None:
        """Remove all snapshots."""
        if self.component_snapshots:
            self.component_snapshots.clear()
            self.touch()

    @property
    def snapshot_count(self) -> int:
        """The number of snapshots."""
        return len(self.component_snapshots)

    def save_grants(self, grants: Sequence[CommandGrant]) -> None:
        """Replace the granted commands."""
        if self.granted_commands != list(grants):
            self.granted_commands = list(grants)
            self.touch()

    @property
    def grant_count(self) -> int:
        """The number of granted commands."""
        return len(self.granted_commands)

    @property
    def created_at(self) -> datetime:
        """When the session was created, in UTC."""
        return to_datetime(self.created_at_ms)

    @property
    def updated_at(self) -> datetime:
        """When the session was last changed, in UTC."""
        return to_datetime(self.updated_at_ms)

    def to_json(self) -> str:
        """Encode the session as orcs writes it.

        Raises:
            SerializationError: for what JSON can't hold.
            VersionIncompatibleError: for another version than 1.
            ValueError: the asset is partial (`load(id, last=n)`).

        """
        pack(self.extra, FreeForm, "", level=1)
        check_asset(self)
        document = _document(self)
        for key, hint, _ in json_fields(type(self)).values():
            pack(document[key], hint, key)
        if self.history.skipped:
            raise ValueError(f"the asset is partial: {self.history.skipped} of its turns were not loaded")
        document["history"] = _with_raw_embedded(self.history)
        context = self.project_context
        facts = [msgspec.structs.replace(f, confidence=f32_text(f.confidence)) for f in context.learned_facts]
        document["project_context"] = msgspec.structs.replace(context, learned_facts=facts)
        return dump_json(document | self.extra)

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Decode a session that orcs or `to_json` wrote.

        Raises:
            VersionIncompatibleError: for another version than 1.
            CorruptSessionError: for anything else that can't be decoded.

        """
        # As a whole: of what is passed over (fields that are unknown) msgspec does not ask whether it is UTF-8.
        whole, refusal = attempt(str.encode, text) if isinstance(text, str) else attempt(bytes.decode, text)
        if refusal is not None:
            raise CorruptSessionError("")
        data = whole if isinstance(text, str) else text
        asset = parse_written(data, cls, _document)
        if asset is None or asset.version != SESSION_VERSION:
            asset = _parse(cls, data)
        _extract_raw(asset.history)
        return asset


class JsonField(NamedTuple):
    """A top-level field: its name in JSON, its type, and whether it must be there."""

    key: str
    hint: Any
    required: bool


@cache
def json_fields(cls: type[SessionAsset]) -> dict[str, JsonField]:
    """Return a session type's top-level fields by their names in Python, in order, without ``extra``."""
    infos = msgspec.structs.fields(cls)
    return {f.name: JsonField(f.encode_name, f.type, f.required) for f in infos if f.name != "extra"}


def _document(asset: SessionAsset) -> dict[str, Any]:
    """Return the top-level fields by their names in JSON, without ``extra``."""
    return {field.key: getattr(asset, name) for name, field in json_fields(type(asset)).items()}


def _with_raw_embedded(history: ConversationHistory) -> ConversationHistory:
    """Return a history as orcs has it: raw items in the metadata of their turns."""
    turns = [
        turn if turn.raw is None and "raw" not in turn.metadata else _embed(turn, f"history.turns[{n}]")
        for n, turn in enumerate(history.turns)
    ]
    return msgspec.structs.replace(history, turns=turns)


def _embed(turn: ConversationTurn, where: str) -> ConversationTurn:
    if turn.raw is None:
        if extracted(turn.metadata["raw"], turn.content) is not None:
            raise SerializationError(f"{where}.metadata.raw", "it would come back as a raw item")
        return turn
    if fault := raw_fault(turn.raw, turn.role, turn.content, turn.metadata):
        raise SerializationError(f"{where}.{fault[0]}", fault[1])
    content = content_of(turn.raw, turn.role)
    metadata = turn.metadata | {"raw": embedded(turn.raw, content)}
    return msgspec.structs.replace(turn, content=content, metadata=metadata, raw=None)


def _extract_raw(history: ConversationHistory) -> None:
    """Bring raw items back from the metadata of their turns."""
    for turn in history.turns:
        turn.raw = extracted(turn.metadata["raw"], turn.content) if "raw" in turn.metadata else None
        if turn.raw is not None:
            del turn.metadata["raw"]
            turn.content = content_of(turn.raw, turn.role)


def _parse(cls: type[A], data: bytes) -> A:
    """Decode JSON field by field, to say what is wrong and keep what is unknown."""
    raw = parse_json(data, dict[str, msgspec.Raw])
    if "version" in raw and type(found := parse_json(raw["version"], Any, "", "version")) is int:
        check_version(found)
    own_id = parse_json(raw["id"], str, "", "id") if "id" in raw else ""
    if len(own_id) > MAX_ID_BYTES or not own_id.isprintable():
        own_id = named(own_id)  # in errors
    fields: dict[str, Any] = {}
    for name, (key, hint, required) in json_fields(cls).items():
        if key in raw:
            fields[name] = parse_json(raw.pop(key), hint, own_id, key)
        elif required:
            raise CorruptSessionError(own_id, key)
    extra = {key: parse_json(value, Any, own_id, named(key)) for key, value in raw.items()}
    twice = repeated_field(data, {key: hint for key, hint, _ in json_fields(cls).values()})
    if twice is not None:
        raise CorruptSessionError(own_id, twice)
    return cls(**fields, extra=extra)


def check_version(version: int) -> None:
    """Raise VersionIncompatibleError unless it is version 1."""
    if version != SESSION_VERSION:
        raise VersionIncompatibleError(version, SESSION_VERSION)


def check_time(name: str, ms: object) -> None:
    """Raise SerializationError unless it is a time that lists can show."""
    if type(ms) is not int or ms > MAX_TIME_MS:
        pack(ms, U64, name)
        raise SerializationError(name, "after the year 9999")


def check_asset(asset: SessionAsset) -> None:
    """Check of an asset to be stored what its fields' own types don't say; each field is packed by the caller."""
    if asset.version != SESSION_VERSION:
        pack(asset.version, U32, "version")
        check_version(asset.version)
    check_time("created_at_ms", asset.created_at_ms)
    check_time("updated_at_ms", asset.updated_at_ms)
    extra = asset.extra
    if type(extra) is not dict or {*map(type, extra)} - {str} or attempt(encode, [*extra])[1] is not None:
        pack(extra, FreeForm, "", level=1)
    if taken := {field.key for field in json_fields(type(asset)).values()} & extra.keys():
        raise SerializationError(f"extra.{named(min(taken))}", "a field of this name exists")
