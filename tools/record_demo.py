"""Records the demo's page as an animated GIF, for the README.

    python -m tools.record_demo docs/_static/demo.gif

Needs Chromium, Pillow and websockets, and a running demo (scripts/demo) at port 8000.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from tools.browser import Page, find_chromium, open_page

SIZE = (1280, 800)
WIDTH, HEIGHT = 800, 500  # pixels of the picture
FRAMES = 12  # a second, at most
COLOURS = 192
COMMON = 64  # of them as they are
STILL = 0.3  # seconds for which a picture stands at most


@dataclass
class Shot:
    at: float  # seconds
    picture: bytes


@dataclass
class Frame:
    image: Image.Image
    seconds: float


class Recorder:
    """Collects what Chromium draws."""

    def __init__(self, page: Page) -> None:
        self.shots: list[Shot] = []
        self.speeds: list[tuple[float, float]] = []  # (from when, how many times as fast)
        self._page = page
        self._tasks: set[asyncio.Task[Any]] = set()
        page.on_event = self._on_event

    async def start(self) -> None:
        await self._page.command(
            "Page.startScreencast", format="png", maxWidth=WIDTH, maxHeight=HEIGHT, everyNthFrame=1
        )

    async def stop(self) -> None:
        await self._page.command("Page.stopScreencast")

    def set_speed(self, times: float) -> None:
        self.speeds.append((self.shots[-1].at if self.shots else 0.0, times))

    def _on_event(self, method: str, params: dict[str, Any]) -> None:
        if method != "Page.screencastFrame":
            return
        at = params["metadata"]["timestamp"]
        self.shots.append(Shot(at, base64.b64decode(params["data"])))
        ack = self._page.command("Page.screencastFrameAck", sessionId=params["sessionId"])
        task = asyncio.ensure_future(ack)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def frames(self) -> list[Frame]:
        frames: list[Frame] = []
        begun = self.shots[0].at
        for shot, following in itertools.pairwise(self.shots):
            speed = next(times for since, times in reversed(self.speeds) if since <= shot.at)
            seconds = (following.at - begun) / speed
            if seconds >= 1 / FRAMES:
                image = Image.open(io.BytesIO(shot.picture)).convert("RGB")
                frames.append(Frame(image, min(seconds, STILL)))
                begun = following.at
        return frames


async def play(page: Page, recorder: Recorder) -> None:
    """What the recording shows."""
    away = "document.querySelector('.window.away')"
    down = "document.querySelector('#rabbitmq.down')"
    await page.until("document.querySelector('#received')?.textContent > 4", 20)
    recorder.set_speed(1)
    await recorder.start()
    await asyncio.sleep(2)
    await page.click("#burst")
    await page.until("document.querySelector('#burst-result').textContent", 30)
    await asyncio.sleep(1.5)
    await page.click('[data-action="kill-1"]')
    await page.until(away, 10)
    await page.until(f"!{away}", 30)
    await asyncio.sleep(1.5)
    await page.click('[data-action="restart-rabbitmq"]')
    await page.until(down, 10)
    await asyncio.sleep(1)
    recorder.set_speed(4)
    await page.until(f"!{down}", 60)
    recorder.set_speed(1)
    await asyncio.sleep(3)
    await recorder.stop()


def save(frames: list[Frame], path: Path) -> None:
    # One palette for all: each with its own would flicker, and be larger.
    palette = palette_of([frame.image for frame in frames[::6]])
    first, *rest = [f.image.quantize(palette=palette, dither=Image.Dither.NONE) for f in frames]
    durations = [round(1000 * frame.seconds) for frame in frames]
    first.save(path, save_all=True, append_images=rest, duration=durations, loop=0, optimize=True)


def palette_of(images: list[Image.Image]) -> Image.Image:
    """The commonest colours as they are; and some for dots, which are few pixels."""
    sheet = Image.new("RGB", (images[0].width, sum(image.height for image in images)))
    for index, image in enumerate(images):
        sheet.paste(image, (0, index * image.height))
    colours = sorted(sheet.getcolors(sheet.width * sheet.height) or [], reverse=True)
    common = [value for _, colour in colours[:COMMON] for value in colour]
    rest = sheet.quantize(COLOURS - COMMON, method=Image.Quantize.MAXCOVERAGE).getpalette() or []
    palette = Image.new("P", (1, 1))
    palette.putpalette((common + rest)[: 3 * COLOURS])
    return palette


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path)
    parser.add_argument("--address", default="http://127.0.0.1:8000")
    parser.add_argument("--dark", action="store_true")
    options = parser.parse_args()
    chromium = find_chromium()
    if chromium is None:
        parser.error("needs Chromium")
    async with open_page(chromium, options.address, *SIZE) as page:
        await page.set_dark(options.dark)
        recorder = Recorder(page)
        await play(page, recorder)
    frames = recorder.frames()
    save(frames, options.path)
    size = options.path.stat().st_size / 1e6
    print(f"{len(recorder.shots)} pictures, {len(frames)} frames, {size:.2f} MB")


if __name__ == "__main__":
    asyncio.run(main())
