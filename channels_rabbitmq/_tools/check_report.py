"""What ``check`` finds: its steps, as lines for a person or as JSON for a program."""

from __future__ import annotations

import enum
import json
from collections.abc import Sequence
from dataclasses import dataclass

_NAME_WIDTH = 14


class Status(enum.Enum):
    """How a step has ended."""

    OK = "ok"
    WARNING = "warning"  # The layer works all the same.
    FAILED = "failed"
    NOT_TRIED = "not tried"


_MARKS = {Status.OK: "ok", Status.WARNING: "WARN", Status.FAILED: "FAIL"}


@dataclass(frozen=True)
class Finding:
    """What one step has found; ``advice`` is what to do about it, or ""."""

    text: str
    advice: str = ""
    status: Status = Status.OK


@dataclass(frozen=True)
class Step:
    """One entry of the report; ``url`` if it is about one of several URLs."""

    name: str
    finding: Finding
    seconds: float | None = None
    url: str = ""

    def lines(self) -> list[str]:
        """Return it as a person reads it."""
        time = "" if self.seconds is None else f"{self.seconds * 1000:.1f} ms"
        mark = _MARKS[self.finding.status]
        first, *rest = self.finding.text.splitlines() or [""]
        lines = [f"{mark:<4}  {self.name:<{_NAME_WIDTH}} {time:>10}  {first}"]
        lines += [f"{'':<6}{line}" for line in rest]
        if self.finding.advice:
            lines.append(f"{'':<6}-> {self.finding.advice}")
        return [line.rstrip() for line in lines]

    def as_json(self) -> dict[str, object]:
        """Return it for ``--json``."""
        return {
            "name": self.name,
            "status": self.finding.status.value,
            "seconds": None if self.seconds is None else round(self.seconds, 6),
            "text": self.finding.text,
            "advice": self.finding.advice,
            "url": self.url or None,
        }


class Report:
    """Collects the steps; prints each at once, or all in the end as JSON."""

    def __init__(self, *, as_json: bool) -> None:
        self.names: Sequence[str] = ()  # of all the steps that there are if none fails
        self._as_json = as_json
        self.steps: list[Step] = []
        self._url = ""  # of the last step that was printed

    def add(self, step: Step) -> None:
        self.steps.append(step)
        if self._as_json:
            return
        if step.url != self._url:
            self._url = step.url
            print(f"\n{step.url}" if step.url else "")
        print(*step.lines(), sep="\n", flush=True)

    def with_status(self, status: Status) -> list[str]:
        """Return the names of the steps that have ended so, each once."""
        return list(dict.fromkeys(s.name for s in self.steps if s.finding.status is status))

    @property
    def is_ok(self) -> bool:
        return not self.with_status(Status.FAILED)

    def finish(self, seconds: float) -> None:
        """Add what wasn't tried, and print the end."""
        tried = {step.name for step in self.steps}
        not_tried = [name for name in self.names if name not in tried]
        if self._as_json:
            finding = Finding("", status=Status.NOT_TRIED)
            self.steps += [Step(name, finding) for name in not_tried]
            self._print_json(seconds)
            return
        if not_tried:
            print(f"-     not tried: {', '.join(not_tried)}")
        if self.is_ok:
            warnings = len(self.with_status(Status.WARNING))
            told = f", with {warnings} warning{'s' * (warnings > 1)}" if warnings else ""
            print(f"\nThe channel layer works{told} ({seconds:.1f} s).", flush=True)

    def _print_json(self, seconds: float) -> None:
        content = {
            "ok": self.is_ok,
            "seconds": round(seconds, 3),
            "steps": [step.as_json() for step in self.steps],
        }
        print(json.dumps(content, indent=2), flush=True)
