"""Names of channels and groups: ASCII letters, digits, "-", "_", "." and, for channels, one "!"."""

from __future__ import annotations

import subprocess
import sys

import pytest

from channels_rabbitmq._names import require_channel_name, require_group_name

BAD_NAMES = ["", "a b", "ä", "a/b", "a\n", "٣", "x" * 100, "a,b", None, 3, b"bytes"]


@pytest.mark.parametrize("name", ["a", "A-Z_0.9", "x" * 99])
def test_allowed_names_pass(name: str) -> None:
    require_channel_name(name)
    require_group_name(name)


@pytest.mark.parametrize("name", BAD_NAMES)
def test_other_names_are_refused_in_words_that_show_them(name: object) -> None:
    with pytest.raises(TypeError, match=r"Invalid channel name .*at most 99 ASCII") as caught:
        require_channel_name(name)
    assert repr(name) in str(caught.value)
    with pytest.raises(TypeError, match=r"Invalid group name .*at most 99 ASCII") as caught:
        require_group_name(name)
    assert repr(name) in str(caught.value)


def test_only_a_channel_may_hold_one_exclamation_mark() -> None:
    require_channel_name("specific!abc")
    require_channel_name("specific!")
    for name in ("a!b!c", "!abc"):
        with pytest.raises(TypeError):
            require_channel_name(name)
    with pytest.raises(TypeError):
        require_group_name("group!")


def test_names_are_checked_under_python_O_too() -> None:
    code = """
import asyncio
from channels_rabbitmq.core import RabbitmqChannelLayer
layer = RabbitmqChannelLayer()
for call in (layer.send("a b", {}), layer.group_send("a!", {}), layer.group_add("g", "ä!x")):
    try:
        asyncio.run(call)
    except TypeError:
        print("refused")
"""
    done = subprocess.run(
        [sys.executable, "-O", "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert (done.stdout.split(), done.stderr) == (["refused"] * 3, "")
