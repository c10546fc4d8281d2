"""The server's state as server-sent events: a listener gets it immediately, and after every change."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

KEEP_ALIVE = 15.0  # maximum seconds between two messages
SLOWEST = 0.1  # minimum seconds between two messages: a step of training may take a hundredth of that


class Feed:
    """Notifies its listeners that something has changed; `notify` may be called from any thread."""

    def __init__(self, state: Callable[[], Any]) -> None:
        self._state = state
        self._listeners: set[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = set()
        self._lock = threading.Lock()

    def notify(self) -> None:
        with self._lock:
            for loop, changed in self._listeners:
                with contextlib.suppress(RuntimeError):  # the loop has been closed
                    loop.call_soon_threadsafe(changed.set)

    async def listen(self) -> AsyncIterator[str]:
        """Messages of the event stream, which never ends by itself."""
        listener = (asyncio.get_running_loop(), asyncio.Event())
        with self._lock:
            self._listeners.add(listener)
        try:
            while True:
                yield f"data: {json.dumps(self._state())}\n\n"
                await asyncio.sleep(SLOWEST)
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(listener[1].wait(), KEEP_ALIVE)
                listener[1].clear()
        finally:
            with self._lock:
                self._listeners.discard(listener)
