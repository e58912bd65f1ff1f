"""The layer before it has called a broker."""

from __future__ import annotations

import re
import threading
from typing import Any

import pytest
from channels.exceptions import (
    ChannelFull,
    InvalidChannelLayerError,
    MessageTooLarge,
)
from channels.layers import BaseChannelLayer

from channels_rabbitmq.core import RabbitmqChannelLayer


class TestConstruction:
    def test_made_without_a_loop_and_in_a_thread(self) -> None:
        made = [RabbitmqChannelLayer()]
        thread = threading.Thread(target=lambda: made.append(RabbitmqChannelLayer()))
        thread.start()
        thread.join()
        assert len(made) == 2

    @pytest.mark.parametrize(
        ("config", "option"),
        [
            ({"hosts": ["amqp://x"]}, "hosts"),
            ({"local_capacity": -1}, "local_capacity"),
            ({"expiry": "60"}, "expiry"),
            ({"host": "http://x"}, "host"),
        ],
    )
    def test_a_bad_option_is_named(self, config: dict[str, Any], option: str) -> None:
        with pytest.raises(InvalidChannelLayerError, match=option):
            RabbitmqChannelLayer(**config)

    def test_the_password_is_in_no_repr(self) -> None:
        layer = RabbitmqChannelLayer(host="amqp://user:s3cret@example.com/vhost")
        assert repr(layer) == "<RabbitmqChannelLayer: amqp://user@example.com:5672/vhost>"

    def test_attributes_of_the_specification_and_the_base_class(self) -> None:
        layer = RabbitmqChannelLayer(
            expiry=5,
            capacity=7,
            channel_capacity={"http.*": 3, re.compile(r"^slow"): 2},
        )
        assert isinstance(layer, BaseChannelLayer)
        assert layer.extensions == ["groups"]
        assert layer.ChannelFull is ChannelFull
        assert layer.MessageTooLarge is MessageTooLarge
        assert (layer.expiry, layer.capacity) == (5, 7)
        assert [layer.get_capacity(c) for c in ("http.x", "slow!a", "other")] == [3, 2, 7]
