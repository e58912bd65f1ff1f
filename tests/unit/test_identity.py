"""Ids of ``LoopLayer`` objects, and the names of their channels."""

from __future__ import annotations

import pytest

from channels_rabbitmq._identity import (
    LONGEST_NAME,
    ChannelNames,
    id_of,
    new_id,
)
from channels_rabbitmq._names import require_channel_name


def test_names_are_new_valid_and_local() -> None:
    id_ = new_id()
    names = ChannelNames(id_)
    seen = {names.new("specific.") for _ in range(1000)}
    assert len(seen) == 1000
    for name in seen:
        require_channel_name(name)
        assert id_of(name) == id_
        assert names.is_local(name)
        assert names.is_valid(name)
        names.require_local(name)


def test_a_long_prefix_is_cut() -> None:
    names = ChannelNames(new_id())
    one, other = (names.new("x" * 99) for _ in range(2))
    assert len(one) == len(other) == LONGEST_NAME
    assert one != other


def test_names_of_others() -> None:
    names, others = ChannelNames(new_id()), ChannelNames(new_id())
    name = others.new("specific.")
    assert not names.is_local(name)
    assert not names.is_valid(name)
    with pytest.raises(ValueError, match="another process or event loop"):
        names.require_local(name)


def test_names_that_no_channel_has() -> None:
    names = ChannelNames(new_id())
    assert not names.is_valid(names.prefix)
    with pytest.raises(ValueError, match=r"wasn't made by new_channel\(\)"):
        names.require_local(names.prefix)
    assert not names.is_valid(names.prefix + "x" * LONGEST_NAME)
