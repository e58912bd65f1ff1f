"""Presses the buttons of the demo's page in headless Chromium: does the page count what it should?

    python -m tools.check_demo http://127.0.0.1:8000

Without Chromium it says so, and nothing is wrong.
"""

from __future__ import annotations

import asyncio
import sys
import time
from dataclasses import dataclass

from tools.browser import BrowserFailed, Page, find_chromium, open_page

BURST = 5000
PATIENCE = 60.0  # seconds for each step, on a busy machine

_COUNTS = """(() => {
    const number = (element) => Number(element.textContent.replaceAll(",", ""));
    const named = [...document.querySelectorAll("#others li")];
    const facts = [...document.querySelectorAll(".process [data-fact]")];
    return {
        sent: number(document.querySelector("#sent")),
        received: number(document.querySelector("#received")),
        lost: number(document.querySelector("#lost")),
        others: Object.fromEntries(named.map((li) => [li.dataset.name, number(li.firstChild)])),
        browsers: [...document.querySelectorAll(".count")].map(number),
        processes: facts.map((fact) => fact.textContent),
    };
})()"""


# Two windows: of four messages one gets all; the other gets two, and its process is killed.
# Of two more, while RabbitMQ is killed, it gets the second.
_LEDGER = """(async () => {
    const { Ledger } = await import("/ledger.js");
    const ledger = new Ledger(), one = {}, two = {}, three = {};
    for (const number of [0, 1, 2, 3]) ledger.send(one, number, "", [one, two]);
    for (const number of [0, 1, 2, 3]) ledger.receive(one, one, number);
    for (const number of [0, 2]) ledger.receive(two, one, number);
    ledger.end(two);
    for (const number of [4, 5]) ledger.send(one, number, "", [three]);
    ledger.noteOutage();
    ledger.receive(three, one, 5);
    const { sent, received, lost, process, rabbitmq, pending } = ledger;
    return { sent, received, lost, process, rabbitmq, pending };
})()"""
_LEDGER_COUNTS = {"sent": 6, "received": 3, "lost": 1, "process": 1, "rabbitmq": 1, "pending": 0}


class CheckFailed(Exception):
    """The text says what isn't as it should be."""


@dataclass(frozen=True)
class Counts:
    """What the page shows."""

    sent: int
    received: int
    lost: int
    others: dict[str, int]  # those that are under way, or lost for a reason
    browsers: list[int]  # received by each
    processes: list[str]


class Visitor:
    """Somebody with the page before them."""

    def __init__(self, page: Page) -> None:
        self._page = page
        self._started_at = time.monotonic()

    async def look(self) -> Counts:
        return Counts(**await self._page.evaluate(_COUNTS))

    async def see(self, expression: str) -> None:
        await self._page.until(expression, PATIENCE)

    async def press(self, selector: str) -> None:
        await self._page.click(selector)

    async def say(self, browser: int, text: str) -> None:
        await self.press(f'[data-window="{browser}"] input')
        await self._page.type(text)

    async def see_all_received(self, *, by_process: bool = False) -> Counts:
        """By all to whom they are due. ``by_process``: some may have gone with a process."""
        deadline = time.monotonic() + PATIENCE
        while True:
            counts = await self.look()
            others = dict(counts.others)
            gone = others.pop("process", 0) if by_process else 0
            if counts.lost:
                raise CheckFailed(f"{counts.lost} messages were lost")
            if not others and counts.received + gone == counts.sent:
                return counts
            if time.monotonic() > deadline:
                raise CheckFailed(f"after {PATIENCE:g} seconds: {counts}")
            await asyncio.sleep(0.05)

    def report(self, text: str) -> None:
        print(f"{text} ({time.monotonic() - self._started_at:.1f} s)", flush=True)


async def check_ledger(page: Page) -> None:
    """What the page counts with does count losses."""
    counts = await page.evaluate(_LEDGER)
    if counts != _LEDGER_COUNTS:
        raise CheckFailed(f"the ledger counts {counts} instead of {_LEDGER_COUNTS}")


async def check_talk(visitor: Visitor) -> None:
    """The page talks by itself, until it is told not to."""
    await visitor.see("Number(document.querySelector('#received')?.textContent) > 2")
    await visitor.press("#chatter")
    counts = await visitor.see_all_received()
    visitor.report(f"Page: {counts.received} messages came by themselves")


async def check_burst(visitor: Visitor) -> None:
    before = await visitor.look()
    await visitor.press("#burst")
    await visitor.see("document.querySelector('#burst-result').textContent")
    counts = await visitor.see_all_received()
    each = [now - then for now, then in zip(counts.browsers, before.browsers, strict=True)]
    if each != 4 * [BURST]:
        raise CheckFailed(f"of {BURST} messages at once the browsers got {each}")
    visitor.report(f"{BURST} messages at once: all came to each of 4 browsers")


async def check_freeze(visitor: Visitor) -> None:
    """One consumer hangs. The others get what is said; it gets it later."""
    before = await visitor.look()
    await visitor.press('[data-window="4"] .freeze')
    await visitor.see("document.querySelector('[data-window=\"4\"].frozen')")
    for number in range(3):
        await visitor.say(1, f"Are you cold? {number}")
    others = before.browsers[:3]
    await visitor.see(
        "[...document.querySelectorAll('.count')].slice(0, 3)"
        f".every((it, i) => Number(it.textContent.replaceAll(',', '')) === {others}[i] + 3)"
    )
    counts = await visitor.look()
    if counts.browsers[3] != before.browsers[3]:
        raise CheckFailed("the frozen consumer took a message")
    await visitor.press('[data-window="4"] .freeze')
    await visitor.see_all_received()
    visitor.report("Frozen consumer: the others got all at once, and it got all when it was thawed")


async def check_kill(visitor: Visitor) -> None:
    """In the middle of a burst. The other process's browsers get all of it."""
    before = await visitor.look()
    await visitor.press("#burst")
    await visitor.press('[data-action="kill-1"]')
    await visitor.see("document.querySelector('#process-1.down')")
    await visitor.say(1, "Still here?")
    counts = await visitor.see_all_received(by_process=True)
    each = [now - then for now, then in zip(counts.browsers, before.browsers, strict=True)]
    if each[:2] != 2 * [BURST + 1]:
        raise CheckFailed(f"of {BURST + 1} messages the browsers got {each}")
    await visitor.see(
        "!document.querySelector('#process-1.down') && !document.querySelector('.window.away')"
    )
    await visitor.say(1, "All here again?")
    await visitor.say(4, "Yes.")
    counts = await visitor.see_all_received(by_process=True)
    if counts.processes[0] != before.processes[0] or counts.processes[1] == before.processes[1]:
        raise CheckFailed(f"killed process B of {before.processes}: now {counts.processes}")
    gone = counts.others.get("process", 0)
    visitor.report(f"kill -9 in a burst: the others got all; gone with the process: {gone}")


async def check_restart(visitor: Visitor) -> None:
    """What is said while RabbitMQ is away comes when it is back."""
    before = await visitor.look()
    await visitor.press('[data-action="restart-rabbitmq"]')
    await visitor.see("document.querySelector('#rabbitmq.down')")
    for browser in (1, 3, 4):
        await visitor.say(browser, "Where is the rabbit?")
    await visitor.see("!document.querySelector('#rabbitmq.down')")
    counts = await visitor.see_all_received(by_process=True)
    if counts.sent != before.sent + 3:
        raise CheckFailed(f"of 3 messages {counts.sent - before.sent} were sent")
    visitor.report("RabbitMQ restarted: what was said meanwhile came afterwards")


async def check_phone(page: Page, visitor: Visitor) -> None:
    await page.set_size(390, 844)
    await visitor.see("innerWidth === 390")
    width = await page.evaluate("document.documentElement.scrollWidth")
    if width > 390:
        raise CheckFailed(f"the page is {width} pixels wide on a phone with 390")


async def check(chromium: str, address: str) -> None:
    async with open_page(chromium, address, 1280, 800) as page:
        try:
            await check_page(page)
        except (BrowserFailed, CheckFailed) as exc:
            events = await page.evaluate("document.querySelector('#events')?.innerText")
            raise CheckFailed(f"{exc}\nIt says:\n{events}") from exc
        finally:
            for error in page.errors:
                print(f"In the page: {error}", file=sys.stderr)
        if page.errors:
            raise CheckFailed("it has raised exceptions")


async def check_page(page: Page) -> None:
    visitor = Visitor(page)
    await check_talk(visitor)
    await check_ledger(page)
    await check_burst(visitor)
    await check_freeze(visitor)
    await check_kill(visitor)
    if await page.evaluate("document.body.dataset.actions.includes('restart-rabbitmq')"):
        await check_restart(visitor)
    await check_phone(page, visitor)
    counts = await visitor.look()
    print(f"Page: {counts.sent} messages sent, {counts.received} received by all, none lost")


def main() -> int:
    chromium = find_chromium()
    if chromium is None:
        print("No Chromium here: the page's buttons were not pressed.")
        return 0
    try:
        asyncio.run(check(chromium, sys.argv[1]))
    except (BrowserFailed, CheckFailed) as exc:
        print(f"The page: {exc}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
