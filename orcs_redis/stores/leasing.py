"""Leases as their holders see them: handle and context manager. protocol/leases.py claims, renews and releases."""

from __future__ import annotations

import asyncio
import contextlib
import weakref

from ..errors import LeaseHeldError, StorageError
from ..protocol.leases import Leases, check_terms
from ..transport.driver import Driver, Latch

__all__ = ["Lease", "Leasing"]


class Lease:
    """The right to a session, as long as the `async with` block lasts and it is not lost.

    Attributes:
        id: the session's.
        token: grows from one lease to the next; a write with `lease=` is refused once another token was given out.

    """

    def __init__(self, id: str, token: int) -> None:
        self.id = id
        self.token = token
        self._latch = Latch()

    @property
    def lost(self) -> asyncio.Future[None]:
        """Done when the lease is no longer held; each access gives another future, which may be cancelled."""
        return self._latch.waitable

    def end(self) -> None:
        """Note that it is no longer held."""
        self._latch.set()

    def __repr__(self) -> str:
        return f"<Lease id={self.id!r} token={self.token}>"


class Leasing:
    """The context manager that `lease` returns."""

    def __init__(self, driver: Driver, leases: Leases, id: str, ttl: float, wait: float) -> None:
        self._driver = driver
        self._leases = leases
        self._id, self._ttl, self._wait = check_terms(id, ttl, wait)

    async def __aenter__(self) -> Lease:
        driver, leases, id = self._driver, self._leases, self._id
        await driver.create()
        claim = leases.acquire(id, self._ttl)
        try:
            token = await driver.send(claim)
        except LeaseHeldError:
            if self._wait <= 0:
                raise
            wake = asyncio.Event()
            leave = driver.listen({leases.channel(id): lambda _: wake.set()})
            try:
                token = await driver.follow(leases.acquire_when_free(claim, self._wait, wake))
            finally:
                leave()
        self._lease = Lease(id, token)
        renewal = leases.renew(id, token, self._ttl, claim.sent, weakref.ref(self))
        self._stop = driver.in_background(renewal, self._lease.end)
        return self._lease

    async def __aexit__(self, *_: object) -> None:
        self._stop()
        self._lease.end()
        with contextlib.suppress(StorageError):  # then it runs out by itself, or did
            await self._driver.send(self._leases.release(self._id, self._lease.token))
