"""``InMemoryChannelLayer``: for tests that need no RabbitMQ."""

from __future__ import annotations

import copy
import os
import weakref
from functools import partial
from typing import Any

from .._loops.process import Process
from ..core import RabbitmqChannelLayer, capacity_of
from ._memory_broker import MemoryBroker
from ._memory_services import MemoryServices


class InMemoryChannelLayer(RabbitmqChannelLayer):
    """``RabbitmqChannelLayer`` without RabbitMQ, for the tests of one process.

    Takes the same ``CONFIG``, tells of the same mistakes in it, and refuses the same names and
    messages. What is received was packed and unpacked. Its channels are reached by all event loops,
    threads and sync code of the process, and by copies of the layer; another layer has channels of
    its own.

    It differs where RabbitMQ would matter. A channel is full when it holds ``capacity`` messages
    that nobody has received: then ``send`` raises ``ChannelFull``, and ``group_send`` leaves that
    channel out. ``flush`` needs no option. ``carehare_connection`` raises ``BrokerUnavailable``.
    ``on_disconnect``, ``on_reconnect``, and ``host`` as a function, are never called.
    """

    extensions = ["groups", "flush"]  # noqa: RUF012 - the specification asks for a list

    _broker: MemoryBroker | None = None

    def _make_loop_layers(self, process: Process) -> MemoryServices:
        if self._broker is None or self._broker.pid != os.getpid():
            self._broker = MemoryBroker()
        capacity = partial(capacity_of, weakref.ref(self))
        return MemoryServices(process, self._broker, self._settings, capacity)

    def __getstate__(self) -> dict[str, Any]:
        """For pickle: what is unpickled, perhaps in another process, has channels of its own."""
        return {name: value for name, value in super().__getstate__().items() if name != "_broker"}

    def __copy__(self) -> InMemoryChannelLayer:
        return self._copy_with(self.__getstate__())

    def __deepcopy__(self, memo: dict[int, Any]) -> InMemoryChannelLayer:
        """Return another way to the same channels, as a copy of ``RabbitmqChannelLayer`` is."""
        return self._copy_with(copy.deepcopy(self.__getstate__(), memo))

    def _copy_with(self, state: dict[str, Any]) -> InMemoryChannelLayer:
        copied = type(self).__new__(type(self))
        copied._broker = self._broker
        copied.__setstate__(state)
        return copied

    async def flush(self) -> None:
        """Empty all that this layer holds: channels, groups, normal channels.

        Afterwards no channel is in a group. Channels stay valid, and calls of ``receive`` go on
        waiting.
        """
        await self._loop_layer().flush()
