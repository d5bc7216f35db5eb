"""A chat service with FastAPI: turns are posted, and answers arrive as server-sent events from one watch per process.

    pip install '.[embedded]' fastapi uvicorn
    uvicorn --app-dir examples chat_service:app --workers 2

    curl -X PUT localhost:8000/sessions/s-1
    curl -N localhost:8000/sessions/s-1/events &
    curl -X POST localhost:8000/sessions/s-1/turns -H 'content-type: application/json' -d '{"content": "hello"}'

A client that was cut off continues where it was: it sends the number of the last event (EventSource does so itself).
"""

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from typing import Annotated, Any

import msgspec
from fastapi import Depends, FastAPI, Header, Query, Request
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel

from orcs_redis import (
    ConflictError,
    ConversationTurn,
    InvalidIdError,
    LeaseHeldError,
    NotFoundError,
    OutcomeUnknownError,
    PermissionDeniedError,
    RedisSessionStore,
    SerializationError,
    SessionAsset,
    StorageError,
    StoreFullError,
    StoreResetError,
    UnavailableError,
)

Store = RedisSessionStore[SessionAsset]

STATUS: dict[type[StorageError], int] = {
    InvalidIdError: 400,
    PermissionDeniedError: 403,
    NotFoundError: 404,
    ConflictError: 409,
    LeaseHeldError: 409,
    SerializationError: 422,
    UnavailableError: 503,
    OutcomeUnknownError: 504,  # it may have been applied: the client looks before it repeats
    StoreFullError: 507,
}


class Hub:
    """Hands the changes of one watch to all open event streams: a watch for each of them would cost more."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._wakes: defaultdict[str, set[asyncio.Event]] = defaultdict(set)

    async def run(self) -> None:
        """Watch as long as the service lasts. An outage of the server is waited out inside of the watch."""
        while True:
            with contextlib.suppress(StoreResetError):  # wiped, or restored: each stream looks again
                async for change in self._store.watch():
                    for wake in self._wakes.get(change.id, ()):
                        wake.set()
            for wakes in self._wakes.values():
                for wake in wakes:
                    wake.set()
            await asyncio.sleep(1)

    @property
    def streams(self) -> int:
        """The number of open event streams."""
        return sum(map(len, self._wakes.values()))

    @contextlib.contextmanager
    def changes(self, id: str) -> Iterator[asyncio.Event]:
        """Give an event that is set when the session changes."""
        wake = asyncio.Event()
        self._wakes[id].add(wake)
        try:
            yield wake
        finally:
            self._wakes[id].discard(wake)
            if not self._wakes[id]:
                del self._wakes[id]


@contextlib.asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Open one store for each process: after the server has forked, in the loop that uses it."""
    async with await RedisSessionStore.connect(namespace="chat") as store:
        app.state.store, app.state.hub = store, Hub(store)
        watching = asyncio.create_task(app.state.hub.run())
        yield
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching


app = FastAPI(lifespan=lifespan)


def get_store(request: Request) -> Store:
    """Give a handler the process' store."""
    store: Store = request.app.state.store
    return store


def get_hub(request: Request) -> Hub:
    """Give a handler the process' hub."""
    hub: Hub = request.app.state.hub
    return hub


@app.exception_handler(StorageError)
async def storage_error(request: Request, error: Exception) -> JSONResponse:
    """Turn the store's errors into statuses. Their messages name ids and fields, never what is in a session."""
    status = next((code for kind, code in STATUS.items() if isinstance(error, kind)), 500)
    return JSONResponse({"error": type(error).__name__, "detail": str(error)}, status)


class Question(BaseModel):
    """What a client posts."""

    content: str


@app.put("/sessions/{id}", status_code=201)
async def create(id: str, store: Annotated[Store, Depends(get_store)]) -> dict[str, Any]:
    """Make a session; 409 if it is there."""
    return {"id": id, "revision": await store.save(SessionAsset(id=id), if_revision=0)}


@app.post("/sessions/{id}/turns", status_code=201)
async def post(id: str, question: Question, store: Annotated[Store, Depends(get_store)]) -> dict[str, Any]:
    """Add a turn of the user. A worker (see fleet.py) answers it; here the answer is an echo."""
    await store.append(id, ConversationTurn.user(question.content))
    revision = await store.append(id, ConversationTurn.assistant(f"You said: {question.content}"))
    return {"revision": revision}


@app.get("/sessions/{id}/turns")
async def turns(id: str, store: Annotated[Store, Depends(get_store)], last: Annotated[int, Query(gt=0)] = 20) -> Any:
    """Return the newest turns."""
    return msgspec.to_builtins(await store.turns(id, -last))


@app.get("/sessions/{id}/events")
async def events(
    id: str,
    store: Annotated[Store, Depends(get_store)],
    hub: Annotated[Hub, Depends(get_hub)],
    last_event_id: Annotated[int, Header()] = 0,
    count: int | None = None,
) -> StreamingResponse:
    """Stream turns as they come, from the one after `Last-Event-ID` on; with `count`, so many."""
    await store.turns(id, -1)  # 404 before the stream begins

    async def stream() -> AsyncIterator[str]:
        sent, end = last_event_id, None if count is None else last_event_id + count
        with hub.changes(id) as wake:
            while True:
                wake.clear()  # before reading: what comes meanwhile sets it again
                try:
                    new = await store.turns(id, sent)
                except NotFoundError:
                    return  # deleted
                for turn in new:
                    sent += 1
                    yield f"id: {sent}\nevent: turn\ndata: {msgspec.json.encode(turn).decode()}\n\n"
                    if sent == end:
                        return
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(wake.wait(), 15)
                    continue
                yield ": still here\n\n"  # so that proxies keep the connection

    return StreamingResponse(stream(), media_type="text/event-stream")
