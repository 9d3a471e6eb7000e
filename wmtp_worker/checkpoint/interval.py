"""When to save: the interval that loses least, from what a save costs and how often machines are lost.

Saving often costs the saves, saving seldom costs the work since the last one. With a cost of C seconds of training a
save and M seconds between interruptions the optimum is near sqrt(2 C M):

    Young, J. W.: A first order approximation to the optimum checkpoint interval. CACM 17 (9), 1974, 530-531.
    Daly, J. T.: A higher order estimate of the optimum checkpoint interval for restart dumps.
        Future Generation Computer Systems 22 (3), 2006, 303-312.

`IntervalPolicy` measures C, counts the interruptions it is told of, and answers one question after each step::

    policy = IntervalPolicy(settings.checkpoint.every, history=losses.history)
    policy.step(seconds, saving=saver.busy)      # each step
    if policy.due(step, last_saved):             # pure: answers, changes nothing
        policy.saved(pause)                      # seconds the loop stood still
    policy.carried(seconds)                      # snapshot to published; from any thread

Whether a save happens never changes the numbers of the training, so measured times may decide about it.
"""

import logging
import math
import statistics
import threading
from collections import deque
from dataclasses import dataclass
from typing import Literal

log = logging.getLogger(__name__)

DAY = 86_400.0
# seconds to the first save of a process: only a save tells what saves cost. Not where a process was lost before any
FIRST = 300.0
SHORTEST = 30.0  # any restart takes longer than such an interval would save
LONGEST = 3600.0
# What is assumed before anything is observed, as if that many interruptions had been seen in so many days: right for
# machines on the spot market, pessimistic for reserved ones. A rate wrong by 4 makes the waste 1.25 times the least.
PRIOR_INTERRUPTIONS = 1.0
PRIOR_DAYS = 1.0
_CHANGE = 1.2  # a smaller change of the interval is noise
_SAVES = 5  # the last so many saves are remembered
_HALF_LIFE = 50  # steps after which a step counts half in the averages


def young(cost: float, between: float) -> float:
    """Young's optimum, sqrt(2 C M): seconds of training between saves.

    `cost` is the training time a save takes, `between` the mean time between interruptions, both in seconds.
    """
    return math.sqrt(2 * cost * between)


def daly(cost: float, between: float) -> float:
    """Daly's higher-order optimum (2006, eq. 37): seconds of training between saves, the save itself left out.

    Like Young's where `cost` is small against `between` (seconds, both; `between` may be infinite), and still right
    where it is not.
    """
    if cost >= 2 * between:
        return between
    if math.isinf(between):
        return math.inf
    part = math.sqrt(cost / (2 * between))
    return young(cost, between) * (1 + part / 3 + part * part / 9) - cost


def interruptions_per_day(observed: int, days: float) -> float:
    """The expected rate after `observed` interruptions in `days` of running.

    The mean of a gamma distribution, the conjugate prior of a Poisson process: the prior counts as observations do.
    """
    return (PRIOR_INTERRUPTIONS + observed) / (PRIOR_DAYS + days)


@dataclass(frozen=True)
class History:
    """What earlier processes of the run know: how often they were lost, and what their last saves took (seconds).

    `unannounced` counts the interruptions that cost work. One that was announced, and ended with a save, is none that
    an interval could make cheaper (Aupy, Robert, Vivien, Zaidouni: Checkpointing algorithms and fault prediction.
    J. Parallel Distrib. Comput. 74 (2), 2014).
    """

    unannounced: int = 0
    days: float = 0.0
    cost: float | None = None
    carry: float | None = None


@dataclass(frozen=True)
class Choice:
    """An interval: `seconds` wanted, `steps` that come nearest, and why."""

    seconds: float
    steps: int
    step_seconds: float
    why: str

    def __str__(self) -> str:
        return f"every {self.steps} steps of {spell(self.step_seconds)} (wanted: {spell(self.seconds)}): {self.why}"


def choose(cost: float, carry: float, per_day: float, step_seconds: float) -> Choice:
    """The best interval between saves.

    `cost`: seconds of training a save takes. `carry`: seconds to write and upload one checkpoint; a shorter interval
    would only replace the one that waits. `per_day`: unannounced interruptions a day, 0 for never.
    """
    between = DAY / per_day if per_day else math.inf
    optimum = daly(cost, between)
    lost = f"an interruption every {spell(between)}" if per_day else "no interruptions"
    why = f"a save costs {spell(cost)} of training, {lost}"
    seconds = min(max(optimum, SHORTEST), LONGEST)
    if carry > seconds:
        seconds, why = carry, f"{why}; it takes {spell(carry)} to carry one away"
    elif seconds != optimum:
        why += f"; the {'shortest' if optimum < seconds else 'longest'} interval there is"
    return Choice(seconds, max(1, round(seconds / step_seconds)), step_seconds, why)


class IntervalPolicy:
    """Says after each step whether to save now.

    With a number, at every multiple of it. With `auto`, when the best interval of what was measured has passed since
    the last save, and after `FIRST` seconds, or that interval, for the first time. The interval follows the
    measurements when they change it by more than 20 %, and each change is logged.

    Safe to be told things from several threads. With several ranks the first one decides: its answer goes to the
    others together with the request to stop.
    """

    def __init__(
        self,
        every: int | Literal["auto"],
        per_day: float | None = None,
        history: History | None = None,
    ) -> None:
        """`per_day` are interruptions a day if that is known; else they are estimated from `history`."""
        self._every = every
        self._per_day = per_day
        self._history = history or History()
        self._lock = threading.RLock()
        self._warm = False
        self._seconds = 0.0  # of steps in this process
        self._any = _Average()
        self._quiet = _Average()
        # of the save that is being measured: its pause, and the steps while it was carried away
        self._open = False
        self._pause = 0.0
        self._busy_seconds = 0.0
        self._busy_steps = 0.0
        self._saves = 0
        self._costs = _remembered(self._history.cost)
        self._carries = _remembered(self._history.carry)
        self._choice: Choice | None = None

    # --- what is measured ------------------------------------------------------------------------------------

    def step(self, seconds: float, saving: bool = False, steps: float = 1) -> None:
        """`steps` steps took `seconds` together; `saving`: a save was being copied, written or uploaded meanwhile."""
        with self._lock:
            self._seconds += seconds
            if not self._warm:  # the first step compiles, allocates, fills caches
                self._warm = True
                return
            self._any.add(seconds, steps)
            if saving:
                self._busy_seconds += seconds
                self._busy_steps += steps
            else:
                self._quiet.add(seconds, steps)

    def saved(self, pause: float) -> None:
        """A save was begun, for which the loop stood still for `pause` seconds."""
        with self._lock:
            self._measure()
            self._open = True
            self._saves += 1
            self._pause += pause

    def carried(self, seconds: float) -> None:
        """A save is through: written, and published where there is a bucket, `seconds` after it was begun."""
        with self._lock:
            self._carries.append(seconds)
            self._measure()

    def _measure(self) -> None:
        if not self._open:
            return
        # without a quiet step to compare with, nothing is known to be slower
        usual = self._busy_seconds if self._quiet.value is None else self._busy_steps * self._quiet.value
        self._costs.append(self._pause + max(0.0, self._busy_seconds - usual))
        self._open, self._pause, self._busy_seconds, self._busy_steps = False, 0.0, 0.0, 0.0

    @property
    def step_seconds(self) -> float | None:
        """Mean seconds of a step lately; None before the second one."""
        return self._any.value

    @property
    def cost(self) -> float | None:
        """Seconds of training that a save takes: the pause, and how much slower the steps beside it were."""
        # a hiccup of the machine during one save is not what saves cost
        with self._lock:
            return statistics.median(self._costs) if self._costs else None

    @property
    def carry(self) -> float | None:
        """Seconds from the snapshot until the checkpoint is safe."""
        with self._lock:
            return statistics.median(self._carries) if self._carries else None

    @property
    def per_day(self) -> float:
        """Interruptions a day to count with."""
        if self._per_day is not None:
            return self._per_day
        return interruptions_per_day(self._history.unannounced, self._history.days + self._seconds / DAY)

    # --- what follows ----------------------------------------------------------------------------------------

    def due(self, step: int, last_saved: int) -> bool:
        """Whether to save after `step`, when the last save, or attempt, was after `last_saved` (0: none yet)."""
        if self._every != "auto":
            return step > last_saved and step % self._every == 0
        following = self.next_save(last_saved)
        return following is not None and step >= following

    def next_save(self, last_saved: int) -> int | None:
        """The step after which `due` will say yes, as things stand; None before a step was measured."""
        if self._every != "auto":
            return (last_saved // self._every + 1) * self._every
        choice = self.choice
        return None if choice is None else last_saved + choice.steps

    @property
    def choice(self) -> Choice | None:
        """The interval in use with `auto`; None before a step was measured."""
        with self._lock:
            found = self._candidate()
            before = self._choice
            if found and (before is None or not 1 / _CHANGE <= found.steps / before.steps <= _CHANGE):
                self._choice = found
                log.info("saving %s", found)
            return self._choice

    def _candidate(self) -> Choice | None:
        step_seconds, cost = self.step_seconds, self.cost
        if step_seconds is None:
            return None
        if cost is not None:
            choice = choose(cost, self.carry or 0.0, self.per_day, step_seconds)
            if self._saves or choice.seconds <= FIRST:
                return choice
        first, why = FIRST, "the first save tells what saves cost"
        if cost is None and self._history.unannounced:
            first, why = SHORTEST, "no process of this run has come to its first save yet"
        return Choice(first, max(1, round(first / step_seconds)), step_seconds, why)


class _Average:
    """A mean in which a value counts half after `_HALF_LIFE` steps."""

    def __init__(self) -> None:
        self._total = 0.0
        self._weight = 0.0

    def add(self, seconds: float, steps: float) -> None:
        keep = 0.5 ** (steps / _HALF_LIFE)
        self._total = keep * self._total + (1 - keep) * seconds / steps
        self._weight = keep * self._weight + (1 - keep)

    @property
    def value(self) -> float | None:
        return self._total / self._weight if self._weight else None


def _remembered(value: float | None) -> deque[float]:
    return deque([] if value is None else [value], maxlen=_SAVES)


def spell(seconds: float) -> str:
    """A length of time for people: `0.8 ms`, `12.0 s`, `4.9 min`, `24.0 h`, `2.0 d`."""
    if seconds == 0:
        return "0 s"
    for unit, size in (("d", DAY), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s" if seconds >= 0.1 else f"{seconds * 1e3:.1f} ms"
