"""``status``: all processes of an exchange that can be asked, once or live.

The command joins the exchange as a process of its own, asks all others, and leaves itself out.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import sys
import time
from dataclasses import asdict, replace

from .._broker.host_function import with_imported_host
from .._loop_layer import LoopLayer
from .._settings.settings import Settings
from ..exceptions import BrokerUnavailable
from ..status import Status
from . import target
from .own_layer import make_loop_layer
from .quiet import quiet_log
from .status_report import draw, first_lines, is_well

TIMEOUT = 1.0
WATCH_INTERVAL = 2.0
WIDTH = 100
# Seconds, at most, for an attempt to connect, and for a call. The project's limits may be lower.
_CONNECT = 3.0
_CALL = 5.0
_CLEAR = "\x1b[H\x1b[2J"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    target.add_arguments(parser, "ask those at this broker")
    parser.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=_seconds,
        default=TIMEOUT,
        help=f"how long to wait for answers ({TIMEOUT:g})",
    )
    parser.add_argument(
        "--watch",
        metavar="SECONDS",
        type=_seconds,
        nargs="?",
        const=WATCH_INTERVAL,
        help=f"ask again and again, every so many seconds ({WATCH_INTERVAL:g}), until Ctrl-C",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, one line for each time")


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 86400:
        raise argparse.ArgumentTypeError(f"not a number of seconds above 0: {text!r}")
    return seconds


def run(arguments: argparse.Namespace) -> int:
    """Show the processes; return 1 if one is silent or at fault, or can't be asked."""
    _, settings = target.read_target(arguments)
    settings = with_imported_host(settings)
    settings = limited_settings(settings, arguments.timeout)
    with quiet_log():
        return asyncio.run(_run(settings, arguments))


def limited_settings(settings: Settings, timeout: float) -> Settings:
    """Return settings with which one learns soon that nothing answers."""
    return replace(
        settings,
        connect_timeout=min(settings.connect_timeout, _CONNECT),
        operation_timeout=min(settings.operation_timeout, max(_CALL, timeout)),
    )


async def _run(settings: Settings, arguments: argparse.Namespace) -> int:
    layer = make_loop_layer(settings)
    try:
        if arguments.watch is None:
            return await _show_once(layer, arguments)
        while True:
            await _show_next(layer, arguments)
            await asyncio.sleep(arguments.watch)
    finally:
        await layer.close()


async def _show_once(layer: LoopLayer, arguments: argparse.Namespace) -> int:
    try:
        await layer.connect(fail_fast=True)
        status = await _ask(layer, arguments.timeout)
    except BrokerUnavailable as err:
        if arguments.json:
            _print_error(err)
        raise
    _show(_url(layer), status, arguments)
    return 0 if is_well(status) else 1


async def _show_next(layer: LoopLayer, arguments: argparse.Namespace) -> None:
    try:
        status = await _ask(layer, arguments.timeout)
    except BrokerUnavailable as err:
        if arguments.json:
            _print_error(err)
        else:
            _redraw(f"{_now()}  {err}")
    else:
        _show(_url(layer), status, arguments)


async def _ask(layer: LoopLayer, timeout: float) -> Status:
    """Return the status of all others."""
    status = await layer.status(timeout)
    others = tuple(one for one in status.processes if one.statistics.id != layer.id)
    return replace(status, processes=others)


def _show(url: str, status: Status, arguments: argparse.Namespace) -> None:
    if arguments.json:
        _print(json.dumps({"at": time.time(), "is_well": is_well(status), **asdict(status)}))
        return
    is_drawn_anew = arguments.watch is not None and sys.stdout.isatty()
    size = shutil.get_terminal_size((WIDTH, 0))
    lines = draw(status, time.time(), min(size.columns, WIDTH) if is_drawn_anew else WIDTH)
    head = f"{_now()}  {url}  {lines[0]}"
    shown = lines[1:]
    if is_drawn_anew and size.lines:  # Some terminals don't say it, such as those of containers.
        shown = first_lines(shown, size.lines - 2)
    text = "\n".join([head, "", *shown])
    if arguments.watch is None:
        _print(text)
    else:
        _redraw(text)


def _print_error(err: BrokerUnavailable) -> None:
    _print(json.dumps({"at": time.time(), "error": str(err)}))


def _redraw(text: str) -> None:
    _print(f"{_CLEAR}{text}" if sys.stdout.isatty() else f"{text}\n")


def _print(text: str) -> None:
    # A host's name may have letters that the terminal's encoding lacks.
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)


def _now() -> str:
    # Not the local time: Django sets that of the process to its TIME_ZONE.
    return time.strftime("%H:%M:%S UTC", time.gmtime())


def _url(layer: LoopLayer) -> str:
    """Return what the command itself is connected to, without the password."""
    return layer.statistics().subscriber.url or "(not connected)"
