"""Points and calls -> a service, later and in order. Nothing here blocks or raises in the caller's thread.

One thread delivers. While the service is away everything waits in memory and is tried again; what the service refuses
for good is dropped with a warning, since it would hold up all the rest."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from typing import NamedTuple

logger = logging.getLogger(__name__)

LONGEST_PAUSE_S = 5.0
"""Between two attempts; short enough that closing sees several."""
GATHER_S = 15.0
"""Between two deliveries of points. Each holds up the training process for some 10 ms of Python, however few points it
has, and many trials share one server; MLflow's own page looks every 30 s."""


class Point(NamedTuple):
    """One measured value; its own time makes a second delivery of it recognisable."""

    key: str
    value: float
    time_ms: int
    step: int


@dataclass(frozen=True)
class Call:
    """Something else to be done in its turn; `what` names it in warnings."""

    what: str
    make: Callable[[], object]


class Mailbox:
    """Delivers what was put, in the order in which it was put, from a thread of its own.

    `send` takes up to `batch` points at once, and the next ones `gather_s` later. `is_away(error)` tells a service that
    will answer again from one that refuses; `explain(error)` puts an error in a few words that a user may see."""

    def __init__(
        self,
        send: Callable[[Sequence[Point]], object],
        is_away: Callable[[Exception], bool],
        explain: Callable[[Exception], str],
        *,
        name: str,
        batch: int = 1000,
        pause_s: float = 0.5,
        gather_s: float = GATHER_S,
    ) -> None:
        self._send, self._is_away, self._explain = send, is_away, explain
        self._name, self._batch, self._pause_s, self._gather_s = name, batch, pause_s, gather_s
        self._waiting: deque[Point | Call] = deque()
        self._changed = threading.Condition()
        self._singly = 0  # so many items go one by one, after a batch of them was refused
        self._failures = 0  # so many attempts in a row
        self._away_since_s = 0.0
        self._next_pause_s = pause_s
        self._closing = False
        self._abandoned = threading.Event()
        self._thread = threading.Thread(target=self._work, name="mailbox", daemon=True)
        self._thread.start()

    def put(self, *items: Point | Call) -> None:
        """Takes items for delivery; what comes after `close` is ignored."""
        with self._changed:
            if not self._closing:
                self._waiting.extend(items)
                self._changed.notify()

    def close(self, wait_s: float) -> list[Point | Call]:
        """Delivers what is left for at most so many seconds, and returns what was not delivered."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(wait_s)
        self._abandoned.set()
        with self._changed:
            return list(self._waiting)

    def _work(self) -> None:
        while (head := self._head()) and not self._abandoned.is_set():
            try:
                self._deliver(head)
            except Exception as error:  # whatever a network does, training goes on
                if self._is_away(error):
                    self._pause(error)
                    continue
                if len(head) > 1:  # one bad name must not cost the others
                    self._singly = len(head)
                    continue
                what = f"{head[0].key} at step {head[0].step}" if isinstance(head[0], Point) else head[0].what
                logger.warning("%s refuses %s (%s); it is left out there", self._name, what, self._explain(error))
            self._done(head)
            if isinstance(head[0], Point):
                self._gather()

    def _head(self) -> list[Point | Call]:
        """Waits for the next batch: consecutive points, or one call; empty when closing and all is delivered."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing)
            if not self._waiting or isinstance(self._waiting[0], Call):
                return list(islice(self._waiting, 1))
            limit = 1 if self._singly else self._batch
            return list(takewhile(lambda item: isinstance(item, Point), islice(self._waiting, limit)))

    def _deliver(self, head: Sequence[Point | Call]) -> None:
        if isinstance(head[0], Call):
            head[0].make()
        else:
            self._send([item for item in head if isinstance(item, Point)])

    def _pause(self, error: Exception) -> None:
        """Waits before the next attempt, longer each time; warns once for each time that the service is away.

        One attempt alone says nothing: a server closes connections that are idle, at times just as one is used."""
        self._failures += 1
        if self._failures == 1:
            self._away_since_s = time.monotonic()
        elif self._failures == 2:
            text = "%s does not answer (%s); the run goes on, and what it logs is kept and sent later"
            logger.warning(text, self._name, self._explain(error))
        self._abandoned.wait(self._next_pause_s)
        self._next_pause_s = min(2 * self._next_pause_s, LONGEST_PAUSE_S)

    def _gather(self) -> None:
        """Lets points come together, unless they go one by one, fill a batch already, or it is time to go."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._closing or self._singly > 0 or len(self._waiting) >= self._batch, self._gather_s
            )

    def _done(self, head: Sequence[Point | Call]) -> None:
        """Forgets what was delivered or refused; either way the service answered."""
        if self._failures > 1:
            logger.info("%s answers again after %.0f s", self._name, time.monotonic() - self._away_since_s)
        self._failures, self._next_pause_s = 0, self._pause_s
        self._singly = max(0, self._singly - 1)
        with self._changed:
            for _ in head:
                self._waiting.popleft()
