"""The parts of a session: history, preferences, context, skills, snapshots, grants, with orcs' semantics.

Times are milliseconds since 1970, UTC.
"""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Callable, Iterable
from enum import Enum
from typing import Any, Self, TypeAlias

from msgspec import UNSET, UnsetType, field

from .raw import Projection, RawItem, content_of
from .schema import F32, U8, U32, U64, FreeForm, Noted, Part, initial

__all__ = [
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
    "SkillConfig",
    "ToolCallRecord",
    "Trigger",
    "TriggerCondition",
    "UserPreferences",
    "new_id",
    "now_ms",
]


def now_ms() -> int:
    """Return the current time in milliseconds since 1970."""
    return time.time_ns() // 1_000_000


def new_id() -> str:
    """Return a random UUID."""
    return str(uuid.uuid4())


class ToolCallRecord(Part, kw_only=True, gc=False):
    """A call of a tool; ``result`` is None if there is none."""

    _shown = ("tool_name", "success")

    # In Redis an array in this order: new fields only at the end (docs/decisions/0006).
    tool_name: str
    args: Any = initial(dict)
    result: Any = None
    success: bool = initial(lambda: True)
    duration_ms: U64 = initial(int)


class ConversationTurn(Part, kw_only=True, gc=False, omit_defaults=True):
    """One message, with the tool calls made in it. ``role`` is "user", "assistant" or "system".

    With ``raw``, an agent framework's own item, ``content`` is derived: what the item says, or for a format that is
    not known role, format and size. No other content can be stored but that or "".
    """

    _shown = ("id", "role")

    # In Redis an array in this order, as in turns.py: new fields only at the end (docs/decisions/0006).
    id: str = initial(new_id)
    timestamp_ms: U64 = initial(now_ms)
    role: str
    content: str
    tool_calls: list[ToolCallRecord] = initial(list)
    tags: list[str] = initial(list)
    metadata: FreeForm = initial(dict)
    # In orcs' JSON it has another place; under its own name, what a file has there would be taken for it.
    raw: RawItem | None = field(default=None, name="orcs_redis.raw")

    def _derive(self) -> None:
        if self.raw is not None and self.content == "" and isinstance(self.raw, RawItem):
            self.content = content_of(self.raw, self.role)

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

    @classmethod
    def from_raw(
        cls, raw: RawItem, *, role: str | None = None, id: str | None = None, timestamp_ms: int | None = None
    ) -> Self:
        """Make a turn of an agent framework's item.

        What is not given is taken from the item if it has it: role (else "system"), id (else a UUID), time (else now).
        """
        item = raw.projection or Projection("")
        turn = cls(role=role or item.role or "system", content="", raw=raw)
        turn.id = next(known for known in (id, item.id, turn.id) if known is not None)
        turn.timestamp_ms = next(ms for ms in (timestamp_ms, item.timestamp_ms, turn.timestamp_ms) if ms is not None)
        return turn

    def with_tags(self, tags: Iterable[str]) -> Self:
        """Replace the tags; return the turn."""
        self.tags = list(tags)
        return self

    def with_tool_calls(self, calls: Iterable[ToolCallRecord]) -> Self:
        """Replace the tool calls; return the turn."""
        self.tool_calls = list(calls)
        return self


class CompactedTurn(Part, kw_only=True, gc=False):
    """The summary of turns that were removed."""

    _shown = ("turn_count", "start_time_ms", "end_time_ms")

    summary: str
    turn_count: U64
    start_time_ms: U64
    end_time_ms: U64


class ConversationHistory(Noted, kw_only=True):
    """The turns, oldest first, and the summaries of those removed. An empty history is still true."""

    _shown = ("turns", "compacted")

    turns: list[ConversationTurn] = initial(list)
    compacted: list[CompactedTurn] = initial(list)
    max_turns: U64 = 1000

    def __len__(self) -> int:
        return len(self.turns)

    def __bool__(self) -> bool:
        return True

    @property
    def skipped(self) -> int:
        """How many turns before these are stored, but were not loaded; 0 unless `load(id, last=n)` left some out."""
        skipped: int = vars(self).get("_skipped", 0)  # the stores set it: protocol/baseline.py
        return skipped

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


class CodingStylePrefs(Part, kw_only=True):
    """How the user wants code to look. ``indent`` is "spaces" or "tabs"."""

    preferred_languages: list[str] = initial(list)
    indent: str | None = None
    indent_size: U8 | None = None
    naming_convention: str | None = None
    comment_style: str | None = None


class CommunicationPrefs(Part, kw_only=True, gc=False):
    """How the user wants to be spoken to."""

    verbosity: str | None = None
    language: str | None = None
    formality: str | None = None
    include_examples: bool = False


class UserPreferences(Part, kw_only=True):
    """What was learned about the user."""

    coding_style: CodingStylePrefs = initial(CodingStylePrefs)
    communication: CommunicationPrefs = initial(CommunicationPrefs)
    frequent_tools: list[str] = initial(list)
    custom: FreeForm = initial(dict)


class LearnedFact(Part, kw_only=True, gc=False):
    """A fact about the project; ``confidence`` is from 0 to 1, in orcs with the precision of 32 bits."""

    _shown = ("confidence", "learned_at_ms")

    key: str
    value: str
    source: str
    confidence: F32 = initial(lambda: 1.0)
    learned_at_ms: U64 = initial(now_ms)

    @classmethod
    def new(cls, key: str, value: str, source: str) -> Self:
        """Make a fact learned now, with full confidence."""
        return cls(key=key, value=value, source=source)

    def with_confidence(self, confidence: float) -> Self:
        """Set the confidence, at least 0 and at most 1; return the fact."""
        self.confidence = confidence if math.isnan(confidence) else min(max(float(confidence), 0.0), 1.0)
        return self


class ContextInjection(Part, kw_only=True, gc=False):
    """A text to inject into conversations; ``timing`` is "always", "on_request" and the like."""

    _shown = ("id", "timing")

    id: str
    timing: str
    content: str


class ProjectContext(Part, kw_only=True):
    """What is known about the project."""

    _shown = ("learned_facts", "persistent_contexts")

    root_path: str | None = None
    name: str | None = None
    technologies: list[str] = initial(list)
    key_files: list[str] = initial(list)
    architecture_notes: list[str] = initial(list)
    learned_facts: list[LearnedFact] = initial(list)
    persistent_contexts: list[ContextInjection] = initial(list)

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


class OnFileEditTrigger(Part, kw_only=True, gc=False):
    """A file that matches ``glob`` is edited."""

    glob: str


class OnEventTrigger(Part, kw_only=True, gc=False):
    """A custom event of this kind."""

    kind: str


class IntervalTrigger(Part, kw_only=True, gc=False):
    """Every so many seconds."""

    seconds: U64


class TriggerCondition(Part, kw_only=True, gc=False, forbid_unknown_fields=True, omit_defaults=True):
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


class AutoTriggerConfig(Part, kw_only=True):
    """Whether and when a skill starts by itself."""

    _shown = ("enabled", "triggers")

    enabled: bool = initial(bool)
    triggers: list[Trigger] = initial(list)


class SkillConfig(Part, kw_only=True):
    """How a skill is set up."""

    _shown = ("skill_id", "enabled")

    skill_id: str
    enabled: bool = initial(lambda: True)
    auto_trigger: AutoTriggerConfig = initial(AutoTriggerConfig)
    params: FreeForm = initial(dict)

    @classmethod
    def new(cls, skill_id: str) -> Self:
        """Make an enabled skill."""
        return cls(skill_id=skill_id)

    @classmethod
    def disabled(cls, skill_id: str) -> Self:
        """Make a disabled skill."""
        return cls(skill_id=skill_id, enabled=False)


class ComponentSnapshot(Part, kw_only=True):
    """A component's saved state, which it understands itself."""

    _shown = ("component_fqn", "version")

    component_fqn: str
    version: U32 = initial(lambda: 1)
    state: Any = initial(lambda: None)
    metadata: FreeForm = initial(dict)


class GrantKind(Enum):
    """How long a grant holds: until the session ends, or once."""

    PERSISTENT = "Persistent"
    ONE_TIME = "OneTime"


class CommandGrant(Part, kw_only=True, gc=False):
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
