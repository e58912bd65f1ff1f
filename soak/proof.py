"""What the participants noted, and what it proves.

Each participant writes a file of lines, with moments of ``CLOCK_MONOTONIC``, which is the same
clock in all processes of a machine::

    send     SENDER TARGET NUMBER BEGUN ENDED OUTCOME
    receive  CHANNEL SENDER TARGET NUMBER
    join     CHANNEL TARGET SINCE
    leave    CHANNEL TARGET UNTIL

A *target* is a channel or a group. A *stream* is what one sender sends to one target, numbered from
1 upwards, one call after the other. A channel *hears* a target from ``SINCE``, when its membership
was confirmed (or it was made), until ``UNTIL``. That is when the last message which it sent itself,
and then received, was begun: all that had been confirmed before was in its queue before.

Three things must hold:

- *Order, and at most once*: what a channel receives of a stream has rising numbers, always.
- *Nothing else*: a channel receives nothing of a target that it never joined.
- *Delivery*: of each ``send()`` or ``group_send()`` that returned normally, and neither began nor
  ended within the *window* of a fault, the message is received by each channel that heard the
  target from its beginning to its end. A window opens a moment before its fault, since what was
  confirmed and not yet received may be lost with the broker, and closes when every participant
  has its connections, its bindings, and has heard from every other one.

And outside of windows no call may fail.
"""

from __future__ import annotations

import bisect
import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

OK = "ok"

Stream = tuple[str, str]  # sender, target


@dataclass(frozen=True)
class Window:
    """The time of a fault, from a moment before it until all have recovered."""

    kind: str
    opened: float
    closed: float


@dataclass
class Verdict:
    """What was found; no problems: everything holds."""

    problems: list[str] = field(default_factory=list)
    sent: int = 0
    received: int = 0
    required: int = 0  # deliveries that had to happen
    failed_in_windows: int = 0  # calls
    lost_in_windows: int = 0  # deliveries of calls that returned normally


@dataclass(frozen=True)
class _Sent:
    number: int
    begun: float
    ended: float
    outcome: str


class Proof:
    """Reads the lines of all participants, then judges."""

    def __init__(self) -> None:
        self._sent: dict[Stream, list[_Sent]] = defaultdict(list)
        self._received: dict[tuple[str, Stream], list[int]] = defaultdict(list)
        self._since: dict[tuple[str, str], float] = {}  # by channel and target
        self._until: dict[tuple[str, str], float] = {}

    def read(self, lines: Iterable[str]) -> None:
        for line in lines:
            kind, *words = line.split()
            if kind == "send":
                sender, target, number, begun, ended, outcome = words
                sent = _Sent(int(number), float(begun), float(ended), outcome)
                self._sent[sender, target].append(sent)
            elif kind == "receive":
                channel, sender, target, number = words
                self._received[channel, (sender, target)].append(int(number))
            elif kind == "join":
                self._since[words[0], words[1]] = float(words[2])
            elif kind == "leave":
                self._until[words[0], words[1]] = float(words[2])
            else:
                raise ValueError(f"not a line of a participant's: {kind}")

    def judge(self, windows: Sequence[Window]) -> Verdict:
        verdict = Verdict(
            sent=sum(map(len, self._sent.values())),
            received=sum(map(len, self._received.values())),
        )
        self._judge_order(verdict)
        self._judge_calls(verdict, windows)
        self._judge_delivery(verdict, windows)
        return verdict

    def _judge_order(self, verdict: Verdict) -> None:
        for (channel, (sender, target)), numbers in self._received.items():
            if (channel, target) not in self._since:
                verdict.problems.append(f"{channel} received from {target}, which it never joined")
            for before, after in itertools.pairwise(numbers):
                if after <= before:
                    what = "twice" if after == before else f"after {before}"
                    verdict.problems.append(f"{channel}: {after} of {sender} to {target} {what}")

    def _judge_calls(self, verdict: Verdict, windows: Sequence[Window]) -> None:
        for (sender, target), all_sent in self._sent.items():
            for sent in all_sent:
                if sent.outcome == OK:
                    continue
                if is_within(sent.begun, sent.ended, windows):
                    verdict.failed_in_windows += 1
                else:
                    verdict.problems.append(
                        f"{sent.outcome} for {sent.number} of {sender} to {target}, in no window"
                    )

    def _judge_delivery(self, verdict: Verdict, windows: Sequence[Window]) -> None:
        by_target: dict[str, list[Stream]] = defaultdict(list)
        for stream in self._sent:
            by_target[stream[1]].append(stream)
        begun_at = {stream: [sent.begun for sent in self._sent[stream]] for stream in self._sent}
        for (channel, target), since in self._since.items():
            until = self._until.get((channel, target), since)
            for stream in by_target[target]:
                numbers = set(self._received.get((channel, stream), ()))
                first = bisect.bisect_left(begun_at[stream], since)
                for sent in self._sent[stream][first:]:
                    if sent.ended >= until:
                        break
                    if sent.outcome != OK:
                        continue
                    is_lost = sent.number not in numbers
                    if is_within(sent.begun, sent.ended, windows):
                        verdict.lost_in_windows += is_lost
                        continue
                    verdict.required += 1
                    if is_lost:
                        verdict.problems.append(
                            f"{channel} never received {sent.number} of {stream[0]} to {target}, "
                            f"begun at {sent.begun:.3f}, ended at {sent.ended:.3f}"
                        )


def is_within(begun: float, ended: float, windows: Sequence[Window]) -> bool:
    """Whether a call began or ended in a window, or went on for all of one."""
    return any(begun <= window.closed and ended >= window.opened for window in windows)
