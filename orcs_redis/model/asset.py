"""A session and its parts: orcs' session schema, version 1, with orcs' semantics.

A field with ``= value`` may be missing in what is decoded. A field with ``= start(...)`` is required there, as
in orcs; only who makes one in Python gets a default. Unknown nested fields are dropped, as serde does. Times are
milliseconds since 1970, UTC. No repr shows what a user or a model wrote.
"""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from enum import Enum
from functools import cache
from os import PathLike, fspath
from typing import Annotated, Any, ClassVar, Final, NamedTuple, Self, TypeAlias

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from ..errors import CorruptSessionError, SerializationError, VersionIncompatibleError
from .encoding import attempt, dump_json, f32_text, named, pack, parse_json, repeated_field
from .ids import MAX_ID_BYTES

__all__ = [
    "SESSION_VERSION",
    "AutoTriggerConfig",
    "CodingStylePrefs",
    "CommandGrant",
    "CommunicationPrefs",
    "CompactedTurn",
    "ComponentSnapshot",
    "ContextInjection",
    "ConversationHistory",
    "ConversationTurn",
    "GrantKind",
    "IntervalTrigger",
    "LLMTrigger",
    "LearnedFact",
    "OnEventTrigger",
    "OnFileEditTrigger",
    "ProjectContext",
    "SessionAsset",
    "SkillConfig",
    "ToolCallRecord",
    "Trigger",
    "TriggerCondition",
    "UserPreferences",
]

SESSION_VERSION: Final = 1

_F32_MAX: Final = 3.4028235677973362e38  # the largest double that is rounded to an f32, not to infinity
_MAX_TIME_MS: Final = 253_402_300_799_999  # the last millisecond of the year 9999
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)

U64 = Annotated[int, Meta(ge=0)]  # msgspec has no bound beyond int64; encoding.py sees to the upper one
U32 = Annotated[int, Meta(ge=0, le=2**32 - 1)]
U8 = Annotated[int, Meta(ge=0, le=255)]
Time = Annotated[int, Meta(ge=0, le=_MAX_TIME_MS)]
F32 = Annotated[float, Meta(ge=-_F32_MAX, le=_F32_MAX)]
Free: TypeAlias = dict[str, Any]


def now_ms() -> int:
    """Return the current time in milliseconds since 1970."""
    return time.time_ns() // 1_000_000


def to_datetime(ms: int) -> datetime:
    """Return an aware datetime, at most the end of the year 9999."""
    return _EPOCH + timedelta(milliseconds=min(ms, _MAX_TIME_MS))


def _new_id() -> str:
    return str(uuid.uuid4())


class _Start(NamedTuple):
    make: Callable[[], Any]


def start(make: Callable[[], Any]) -> Any:
    """Declare what a field is at first in Python alone: what is decoded must have it."""
    return _Start(make)


class _PartMeta(msgspec.StructMeta):
    """Keeps the `start` values from msgspec, which decodes without calling the class."""

    _starts: dict[str, Callable[[], Any]]

    def __new__(mcls, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **config: Any) -> Any:
        own = {key: value.make for key, value in namespace.items() if isinstance(value, _Start)}
        kept = {key: value for key, value in namespace.items() if key not in own}
        cls = super().__new__(mcls, name, bases, kept, **{"kw_only": True, **config})
        cls._starts = getattr(cls, "_starts", {}) | own
        return cls

    def __call__(cls, *args: Any, **fields: Any) -> Any:
        for name, make in cls._starts.items():
            if name not in fields:
                # With a plain make() CPython's adaptive interpreter would soon skip this very method: once it
                # has seen `dict` there, it calls types by their own vectorcall, which msgspec's have.
                fields[name] = make(*())
        return super().__call__(*args, **fields)


class _Part(Struct, metaclass=_PartMeta):
    _shown: ClassVar[tuple[str, ...]] = ()  # the fields that a repr may show; of a container, its length

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        fields = [(name, getattr(self, name)) for name in self._shown]
        return [(name, len(v) if isinstance(v, (list, dict)) else v) for name, v in fields]

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={value!r}" for name, value in self.__rich_repr__())
        return f"{type(self).__name__}({shown})"


class ToolCallRecord(_Part, kw_only=True, gc=False):
    """A call of a tool; ``result`` is None if there is none."""

    _shown = ("tool_name", "success")

    tool_name: str
    args: Any = start(dict)
    result: Any = None
    success: bool = start(lambda: True)
    duration_ms: U64 = start(int)


class ConversationTurn(_Part, kw_only=True, gc=False):
    """One message, with the tool calls made in it. ``role`` is "user", "assistant" or "system"."""

    _shown = ("id", "role")

    id: str = start(_new_id)
    timestamp_ms: U64 = start(now_ms)
    role: str
    content: str
    tool_calls: list[ToolCallRecord] = start(list)
    tags: list[str] = start(list)
    metadata: Free = start(dict)

    @classmethod
    def user(cls, content: str) -> Self:
        """Make a turn of the user, now."""
        return cls(role="user", content=content)

    @classmethod
    def assistant(cls, content: str) -> Self:
        """Make a turn of the assistant, now."""
        return cls(role="assistant", content=content)

    @classmethod
    def system(cls, content: str) -> Self:
        """Make a turn of the system, now."""
        return cls(role="system", content=content)

    def with_tags(self, tags: Iterable[str]) -> Self:
        """Replace the tags; return the turn."""
        self.tags = list(tags)
        return self

    def with_tool_calls(self, calls: Iterable[ToolCallRecord]) -> Self:
        """Replace the tool calls; return the turn."""
        self.tool_calls = list(calls)
        return self


class CompactedTurn(_Part, kw_only=True, gc=False):
    """The summary of turns that were removed."""

    _shown = ("turn_count", "start_time_ms", "end_time_ms")

    summary: str
    turn_count: U64
    start_time_ms: U64
    end_time_ms: U64


class ConversationHistory(_Part, kw_only=True):
    """The turns, oldest first, and the summaries of those removed. An empty history is still true."""

    _shown = ("turns", "compacted")

    turns: list[ConversationTurn] = start(list)
    compacted: list[CompactedTurn] = start(list)
    max_turns: U64 = 1000

    def __len__(self) -> int:
        return len(self.turns)

    def __bool__(self) -> bool:
        return True

    def recent(self, n: int) -> list[ConversationTurn]:
        """Return the newest ``n`` turns, oldest first."""
        return self.turns[-n:] if n > 0 else []

    def search(self, keyword: str) -> list[ConversationTurn]:
        """Return the turns with ``keyword``, in any case, in their content or a tag."""
        wanted = keyword.lower()
        return [t for t in self.turns if any(wanted in text.lower() for text in (t.content, *t.tags))]

    def in_range(self, start_ms: int, end_ms: int) -> list[ConversationTurn]:
        """Return the turns from ``start_ms`` to ``end_ms``, both included."""
        return [turn for turn in self.turns if start_ms <= turn.timestamp_ms <= end_ms]

    def compact(self, summarizer: Callable[[list[ConversationTurn]], str]) -> None:
        """Replace the oldest turns beyond ``max_turns`` by a summary; if ``summarizer`` raises, keep them."""
        count = len(self.turns) - self.max_turns
        if count > 0:
            old = self.turns[:count]
            summary = CompactedTurn(
                summary=summarizer(old),
                turn_count=count,
                start_time_ms=old[0].timestamp_ms,
                end_time_ms=old[-1].timestamp_ms,
            )
            del self.turns[:count]
            self.compacted.append(summary)


class CodingStylePrefs(_Part, kw_only=True):
    """How the user wants code to look. ``indent`` is "spaces" or "tabs"."""

    preferred_languages: list[str] = start(list)
    indent: str | None = None
    indent_size: U8 | None = None
    naming_convention: str | None = None
    comment_style: str | None = None


class CommunicationPrefs(_Part, kw_only=True, gc=False):
    """How the user wants to be spoken to."""

    verbosity: str | None = None
    language: str | None = None
    formality: str | None = None
    include_examples: bool = False


class UserPreferences(_Part, kw_only=True):
    """What was learned about the user."""

    coding_style: CodingStylePrefs = start(CodingStylePrefs)
    communication: CommunicationPrefs = start(CommunicationPrefs)
    frequent_tools: list[str] = start(list)
    custom: Free = start(dict)


class LearnedFact(_Part, kw_only=True, gc=False):
    """A fact about the project; ``confidence`` is from 0 to 1, in orcs with the precision of 32 bits."""

    _shown = ("confidence", "learned_at_ms")

    key: str
    value: str
    source: str
    confidence: F32 = start(lambda: 1.0)
    learned_at_ms: U64 = start(now_ms)

    @classmethod
    def new(cls, key: str, value: str, source: str) -> Self:
        """Make a fact learned now, with full confidence."""
        return cls(key=key, value=value, source=source)

    def with_confidence(self, confidence: float) -> Self:
        """Set the confidence, at least 0 and at most 1; return the fact."""
        self.confidence = confidence if math.isnan(confidence) else min(max(float(confidence), 0.0), 1.0)
        return self


class ContextInjection(_Part, kw_only=True, gc=False):
    """A text to inject into conversations; ``timing`` is "always", "on_request" and the like."""

    _shown = ("id", "timing")

    id: str
    timing: str
    content: str


class ProjectContext(_Part, kw_only=True):
    """What is known about the project."""

    _shown = ("learned_facts", "persistent_contexts")

    root_path: str | None = None
    name: str | None = None
    technologies: list[str] = start(list)
    key_files: list[str] = start(list)
    architecture_notes: list[str] = start(list)
    learned_facts: list[LearnedFact] = start(list)
    persistent_contexts: list[ContextInjection] = start(list)

    def learn(self, fact: LearnedFact) -> None:
        """Add a fact, unless one of the same key is known."""
        if all(known.key != fact.key for known in self.learned_facts):
            self.learned_facts.append(fact)

    def add_persistent_context(self, context: ContextInjection) -> None:
        """Add a text to inject."""
        self.persistent_contexts.append(context)

    def find_facts(self, keyword: str) -> list[LearnedFact]:
        """Return the facts with ``keyword``, in any case, in their key or value."""
        wanted = keyword.lower()
        return [f for f in self.learned_facts if wanted in f.key.lower() or wanted in f.value.lower()]


class LLMTrigger(Enum):
    """The triggers without parameters."""

    ON_LLM_PRE_REQUEST = "OnLLMPreRequest"
    ON_LLM_POST_RESPONSE = "OnLLMPostResponse"


class OnFileEditTrigger(_Part, kw_only=True, gc=False):
    """A file that matches ``glob`` is edited."""

    glob: str


class OnEventTrigger(_Part, kw_only=True, gc=False):
    """A custom event of this kind."""

    kind: str


class IntervalTrigger(_Part, kw_only=True, gc=False):
    """Every so many seconds."""

    seconds: U64


class TriggerCondition(_Part, kw_only=True, gc=False, forbid_unknown_fields=True, omit_defaults=True):
    """When a skill starts by itself: exactly one field is set, as serde tags an enum, in the file as here.

    The triggers without parameters are `LLMTrigger`; ``Trigger`` is the type of both.
    """

    OnFileEdit: OnFileEditTrigger | UnsetType = UNSET
    OnEvent: OnEventTrigger | UnsetType = UNSET
    Interval: IntervalTrigger | UnsetType = UNSET

    def __post_init__(self) -> None:
        if [self.OnFileEdit, self.OnEvent, self.Interval].count(UNSET) != 2:
            raise ValueError("a trigger has exactly one condition")

    @staticmethod
    def on_file_edit(glob: str) -> TriggerCondition:
        """Make the trigger: a file that matches ``glob`` is edited."""
        return TriggerCondition(OnFileEdit=OnFileEditTrigger(glob=glob))

    @staticmethod
    def on_llm_pre_request() -> LLMTrigger:
        """Make the trigger: before a request to the model."""
        return LLMTrigger.ON_LLM_PRE_REQUEST

    @staticmethod
    def on_llm_post_response() -> LLMTrigger:
        """Make the trigger: after the model's response."""
        return LLMTrigger.ON_LLM_POST_RESPONSE

    @staticmethod
    def on_event(kind: str) -> TriggerCondition:
        """Make the trigger: a custom event of this kind."""
        return TriggerCondition(OnEvent=OnEventTrigger(kind=kind))

    @staticmethod
    def interval(seconds: int) -> TriggerCondition:
        """Make the trigger: every so many seconds."""
        return TriggerCondition(Interval=IntervalTrigger(seconds=seconds))


Trigger: TypeAlias = TriggerCondition | LLMTrigger


class AutoTriggerConfig(_Part, kw_only=True):
    """Whether and when a skill starts by itself."""

    _shown = ("enabled", "triggers")

    enabled: bool = start(bool)
    triggers: list[Trigger] = start(list)


class SkillConfig(_Part, kw_only=True):
    """How a skill is set up."""

    _shown = ("skill_id", "enabled")

    skill_id: str
    enabled: bool = start(lambda: True)
    auto_trigger: AutoTriggerConfig = start(AutoTriggerConfig)
    params: Free = start(dict)

    @classmethod
    def new(cls, skill_id: str) -> Self:
        """Make an enabled skill."""
        return cls(skill_id=skill_id)

    @classmethod
    def disabled(cls, skill_id: str) -> Self:
        """Make a disabled skill."""
        return cls(skill_id=skill_id, enabled=False)


class ComponentSnapshot(_Part, kw_only=True):
    """A component's saved state, which it understands itself."""

    _shown = ("component_fqn", "version")

    component_fqn: str
    version: U32 = start(lambda: 1)
    state: Any = start(lambda: None)
    metadata: Free = start(dict)


class GrantKind(Enum):
    """How long a grant holds: until the session ends, or once."""

    PERSISTENT = "Persistent"
    ONE_TIME = "OneTime"


class CommandGrant(_Part, kw_only=True, gc=False):
    """The permission to run commands that begin with ``pattern``."""

    _shown = ("kind",)

    pattern: str
    kind: GrantKind

    @classmethod
    def persistent(cls, pattern: str) -> Self:
        """Make a grant until the session ends."""
        return cls(pattern=pattern, kind=GrantKind.PERSISTENT)

    @classmethod
    def one_time(cls, pattern: str) -> Self:
        """Make a grant for one use."""
        return cls(pattern=pattern, kind=GrantKind.ONE_TIME)


class SessionAsset(_Part, kw_only=True, dict=True):
    """A session: everything that is kept between runs.

    A subclass may add fields; those with a default may be missing in what is decoded. ``extra`` holds the
    top-level fields that are not known here, as a newer orcs may write; in JSON they stand beside the others.
    """

    id: str = start(_new_id)
    version: U32 = start(lambda: SESSION_VERSION)
    created_at_ms: U64 = start(now_ms)
    updated_at_ms: U64 = start(now_ms)
    history: ConversationHistory = start(ConversationHistory)
    preferences: UserPreferences = start(UserPreferences)
    project_context: ProjectContext = start(ProjectContext)
    skill_configs: dict[str, SkillConfig] = start(dict)
    component_snapshots: dict[str, ComponentSnapshot] = {}
    granted_commands: list[CommandGrant] = []
    metadata: Free = start(dict)
    extra: Free = {}

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

        """
        check_head(self)
        document: dict[str, Any] = {}
        for name, (key, hint, _) in json_fields(type(self)).items():
            document[key] = getattr(self, name)
            pack(document[key], hint, key)
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
        data, decoded = (whole, text) if isinstance(text, str) else (text, whole)
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
        twice = repeated_field(decoded, {key: hint for key, hint, _ in json_fields(cls).values()})
        if twice is not None:
            raise CorruptSessionError(own_id, twice)
        return cls(**fields, extra=extra)


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


def check_version(version: int) -> None:
    """Raise VersionIncompatibleError unless it is version 1."""
    if version != SESSION_VERSION:
        raise VersionIncompatibleError(version, SESSION_VERSION)


def check_head(asset: SessionAsset) -> None:
    """Check of an asset to be stored what its fields' types don't say."""
    pack(asset.extra, Free, "", level=1)
    pack(asset.version, U32, "version")
    check_version(asset.version)
    for name, ms in (("created_at_ms", asset.created_at_ms), ("updated_at_ms", asset.updated_at_ms)):
        pack(ms, U64, name)
        if ms > _MAX_TIME_MS:
            raise SerializationError(name, "after the year 9999")
    if taken := {field.key for field in json_fields(type(asset)).values()} & asset.extra.keys():
        raise SerializationError(f"extra.{named(min(taken))}", "a field of this name exists")
