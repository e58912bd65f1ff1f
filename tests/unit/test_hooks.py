"""``on_disconnect`` and ``on_reconnect``: when they are called, where, and what they can't harm."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from pathlib import Path

import pytest
from asgiref.sync import async_to_sync
from asgiref.testing import ApplicationCommunicator
from channels.exceptions import InvalidChannelLayerError
from channels.layers import channel_layers

from channels_rabbitmq._hooks import Hook
from channels_rabbitmq.core import RabbitmqChannelLayer
from channels_rabbitmq.lifespan import LifespanApp

HOOKS = ("on_disconnect", "on_reconnect")


async def turns() -> None:
    """Let run what is due."""
    for _ in range(10):
        await asyncio.sleep(0)


class TestTheOptions:
    @pytest.mark.parametrize("option", HOOKS)
    @pytest.mark.parametrize(
        ("value", "problem"),
        [
            (1, "must be a callable or the dotted path of one, not int"),
            ([print], "must be a callable or the dotted path of one, not list"),
            ("", "must be a callable or the dotted path of one, such as"),
            ("resynchronise", "must be a callable or the dotted path of one, such as"),
            ("mysite.hooks:resynchronise", "must be a callable or the dotted path of one, such"),
            ("mysite..resynchronise", "must be a callable or the dotted path of one, such as"),
            # What channels_redis has here: the type of a message.
            ("no_such_module.disconnect", "there is no module 'no_such_module'"),
            (lambda: None, "called with two arguments, an id and a reason: too many"),
            (lambda one, two, three: None, "called with two arguments, an id and a reason: miss"),
        ],
    )
    def test_a_mistake_is_told_at_once(self, option: str, value: object, problem: str) -> None:
        with pytest.raises(InvalidChannelLayerError) as caught:
            RabbitmqChannelLayer(**{option: value})
        assert str(caught.value).startswith(f"RabbitmqChannelLayer: {option} ")
        assert problem in str(caught.value)

    @pytest.mark.parametrize("option", HOOKS)
    @pytest.mark.parametrize("value", [None, print, max, lambda *args: None, "os.path.join"])
    def test_what_is_taken(self, option: str, value: object) -> None:
        RabbitmqChannelLayer(**{option: value})

    @pytest.mark.parametrize("option", HOOKS)
    @pytest.mark.parametrize(
        ("source", "problem"),
        [
            ("", "AttributeError: module 'hooks_of_a_test.sub' has no attribute 'hook'"),
            ("hook = 1", f"ValueError: {{}} must be a callable {'or the dotted path of one, '}not"),
            ("def hook(): pass", "two arguments"),
            ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
            ("1 / 0", "ZeroDivisionError: division by zero"),
        ],
    )
    async def test_what_cannot_be_imported_is_told_by_the_first_call(
        self, hooks_module: Path, option: str, source: str, problem: str
    ) -> None:
        hooks_module.write_text(source)
        layer = RabbitmqChannelLayer(**{option: "hooks_of_a_test.sub.hook"})
        for _ in range(2):
            with pytest.raises(InvalidChannelLayerError) as caught:
                await layer.new_channel()
            assert str(caught.value).startswith(f"{option}: cannot use 'hooks_of_a_test.sub.hook'")
            assert problem.format(option) in str(caught.value)
        assert layer.statistics() == ()
        await layer.close()

    async def test_sync_code_is_told_too(self, hooks_module: Path) -> None:
        layer = RabbitmqChannelLayer(on_disconnect="hooks_of_a_test.sub.hook")
        with pytest.raises(InvalidChannelLayerError, match="has no attribute 'hook'"):
            await asyncio.to_thread(lambda: async_to_sync(layer.new_channel)())
        # Mended, it works: nothing has remembered the mistake but Python's own modules.
        sys.modules.pop("hooks_of_a_test.sub")
        hooks_module.write_text("def hook(id, reason): pass  # and a comment, for another size")
        await asyncio.to_thread(lambda: async_to_sync(layer.new_channel)())
        await asyncio.to_thread(lambda: async_to_sync(layer.close)())

    async def test_a_server_that_connects_at_its_start_says_so(
        self, hooks_module: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        layer = RabbitmqChannelLayer(on_reconnect="hooks_of_a_test.sub.hook")
        monkeypatch.setitem(channel_layers.backends, "default", layer)
        server = ApplicationCommunicator(LifespanApp(), {"type": "lifespan"})
        await server.send_input({"type": "lifespan.startup"})
        said = await server.receive_output(10)
        assert said["type"] == "lifespan.startup.failed"
        assert "on_reconnect: cannot use 'hooks_of_a_test.sub.hook'" in said["message"]


class TestWhatItCannotHarm:
    async def test_one_that_will_not_be_cancelled_does_not_hold_up_close(self) -> None:
        release = asyncio.Event()

        async def stubborn(id_: str, reason: str) -> None:
            while not release.is_set():
                with contextlib.suppress(asyncio.CancelledError):
                    await release.wait()

        hook = Hook("on_disconnect", stubborn, "crq.x")
        hook.call("a reason")
        await turns()
        hook.close()
        hook.call("not any more")
        await asyncio.wait_for(hook.wait_closed(0.02), 10)
        release.set()
        await turns()
