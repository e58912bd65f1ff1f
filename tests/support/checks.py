"""Run ``check`` on the test's own event loop, and look at what it has found."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from channels_rabbitmq._settings.settings import Settings
from channels_rabbitmq._tools.check import Check
from channels_rabbitmq._tools.check_report import Report, Status, Step


@dataclass
class Checked:
    """What a check has found."""

    report: Report
    seconds: float

    @property
    def steps(self) -> dict[str, Step]:
        return {step.name: step for step in self.report.steps}

    @property
    def names(self) -> list[str]:
        return [step.name for step in self.report.steps]

    def text(self, name: str) -> str:
        return self.steps[name].finding.text

    def the_failed(self) -> tuple[str, str, str]:
        """The name of the step that has failed, which must be the last; its text and advice."""
        *good, last = self.report.steps
        assert Status.FAILED not in {step.finding.status for step in good}
        assert last.finding.status is Status.FAILED, last
        return last.name, last.finding.text, last.finding.advice

    def warned(self) -> dict[str, str]:
        """The texts of the warnings, by step."""
        steps = self.report.steps
        return {s.name: s.finding.text for s in steps if s.finding.status is Status.WARNING}


async def check(url: str, *, only_sends: bool = False, **config: Any) -> Checked:
    """Check a broker with a ``CONFIG``. What it prints is no business of this."""
    settings = Settings.from_config({"host": url, **config})
    report = Report(as_json=True)
    begun_at = time.monotonic()
    await Check("test", settings, report, only_sends=only_sends).run()
    return Checked(report, time.monotonic() - begun_at)
