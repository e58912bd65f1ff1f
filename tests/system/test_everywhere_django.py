"""The layer in Django's own places: shell, management commands, test runners."""

from __future__ import annotations

import re

from tests.support.programs import Programs

# As Channels' tutorial types it, with a channel that may be received from.
SHELL = """\
import channels.layers
channel_layer = channels.layers.get_channel_layer()
from asgiref.sync import async_to_sync
channel = async_to_sync(channel_layer.new_channel)()
async_to_sync(channel_layer.send)(channel, {'type': 'hello'})
print(async_to_sync(channel_layer.receive)(channel))
"""


async def test_shell(programs: Programs) -> None:
    shell = await programs.start("manage.py", "shell", "--verbosity", "0", "--interface", "python")
    shell.say(SHELL)
    shell.end_input()
    assert await shell.ended() == 0
    assert (shell.stdout, shell.stderr) == ("{'type': 'hello'}\n", "")
    assert programs.roles() == {"publisher": 1, "subscriber": 1}
    await programs.assert_nothing_left()


async def test_management_command(programs: Programs) -> None:
    assert await programs.run("manage.py", "tutorial") == {"type": "hello"}
    assert programs.roles() == {"publisher": 1, "subscriber": 1}


async def test_django_test_runner(programs: Programs) -> None:
    """Async and sync tests, communicators, ``override_settings``: each test has its loops."""
    suite = await programs.start("manage.py", "test", "mysite", "--pattern", "suite.py")
    assert await suite.ended() == 0, repr(suite)
    assert re.search(r"Ran 13 tests in .*\n\nOK\n", suite.stderr), repr(suite)
    suite.assert_quiet()
    await programs.assert_nothing_left()


async def test_pytest_with_a_loop_for_each_test(programs: Programs) -> None:
    suite = await programs.start(
        *("-m", "pytest", "-q", "-c", "pytest.ini", "--rootdir", ".", "-p", "no:cacheprovider"),
        "project_suite.py",
    )
    assert await suite.ended() == 0, repr(suite)
    assert "10 passed" in suite.stdout, repr(suite)
    suite.assert_quiet()
    await programs.assert_nothing_left()
