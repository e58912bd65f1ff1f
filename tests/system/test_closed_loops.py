"""Event loops that are only closed: no noise, and nothing is left, at once (tests/programs)."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys

import pytest

from tests.support.fake_servers import silent_server
from tests.support.old_version import install
from tests.support.programs import Programs
from tools.private_broker import free_port


@pytest.mark.parametrize("function", ["one_call_each", "one_call_each_on_uvloop"])
@pytest.mark.parametrize("times", [5, pytest.param(50, marks=pytest.mark.slow)])
async def test_one_call_on_each(programs: Programs, function: str, times: int) -> None:
    assert await programs.run("closed_loops.py", function, str(times)) is None
    assert programs.roles() == {"publisher": times}
    assert programs.peak == {"publisher": 1}  # each ended with its loop


async def test_with_calls_that_wait(programs: Programs) -> None:
    await programs.run("closed_loops.py", "with_calls_that_wait", "3")
    assert programs.peak == {"publisher": 1, "subscriber": 1, "carehare_connection": 1}


@pytest.mark.parametrize("turns", [8, pytest.param(60, marks=pytest.mark.slow)])
async def test_amid_connecting(programs: Programs, turns: int) -> None:
    program = await programs.start("closed_loops.py", "amid_connecting", str(turns))
    assert await program.result() is None
    await programs.assert_nothing_left(closed=False)  # There are log-ins that were not over.


@pytest.mark.parametrize(
    "function",
    ["beside_a_running_loop", "two_layers", "after_the_layer", "after_the_layers_own_close"],
)
async def test_it_may_be_closed_by_anything_at_any_time(programs: Programs, function: str) -> None:
    assert await programs.run("closed_loops.py", function) is None
    assert programs.opened


async def test_a_close_that_is_refused_ends_nothing(programs: Programs) -> None:
    assert await programs.run("closed_loops.py", "in_vain") == {"type": "n"}


async def test_a_forks_child_does_nothing_to_its_parents_connections(programs: Programs) -> None:
    python = [sys.executable, "-W", "error", "-W", "ignore:This process:DeprecationWarning"]
    program = await programs.start("closed_loops.py", "in_a_child", python=python)
    assert await program.result() == {"type": "n"}
    await programs.assert_nothing_left()


async def test_by_a_close_looked_up_before(programs: Programs) -> None:
    """Nobody is told of that; what asyncio says of such tasks is all there is."""
    python = [sys.executable]
    program = await programs.start(
        "closed_loops.py", "by_a_close_looked_up_before", "3", python=python
    )
    assert await program.ended() == 0
    lines = re.sub(r"Task was destroyed but it is pending!\ntask: <.*>\n", "", program.stderr)
    assert lines == "", repr(program)
    await programs.assert_nothing_left(closed=False)


@pytest.mark.parametrize("is_silent", [False, True])
async def test_without_a_broker(programs: Programs, is_silent: bool) -> None:
    async with silent_server() as server:
        host = server.url if is_silent else f"amqp://127.0.0.1:{free_port()}/"
        program = await programs.start(
            *("closed_loops.py", "without_a_broker", "3"), LAYER_CONFIG=json.dumps({"host": host})
        )
        assert await program.ended() == 0, repr(program)
    program.assert_quiet(allowed="cannot connect to")
    assert len(program.stderr.splitlines()) <= 2 * 3, repr(program)


# Below 1.1 they only close the loop of each test; each with the newest pytest that it takes.
@pytest.mark.slow
@pytest.mark.timeout(180)  # The first time it is installed.
@pytest.mark.skipif(sys.version_info >= (3, 14), reason="they rely on event loop policies")
@pytest.mark.parametrize("version", ["0.21.2", "0.23.8", "0.24.0", "0.26.0", "1.0.0"])
async def test_older_pytest_asyncio(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    programs: Programs,
    version: str,
) -> None:
    requirements = [f"pytest-asyncio=={version}", "pytest==8.3.5"]
    folder = await asyncio.to_thread(
        install, request.config, tmp_path_factory, f"pytest-asyncio-{version}", requirements
    )
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path)
        await _suite_passes(programs)


async def test_the_installed_pytest_asyncio(programs: Programs) -> None:
    await _suite_passes(programs)


async def _suite_passes(programs: Programs) -> None:
    suite = await programs.start(
        *("-m", "pytest", "-q", "-c", os.devnull, "--rootdir", ".", "--noconftest"),
        *("-p", "no:cacheprovider", "-W", "error", "-W", "ignore:The configuration option:Warning"),
        "closed_loops_suite.py",
    )
    assert await suite.ended() == 0, repr(suite)
    assert "24 passed" in suite.stdout, repr(suite)
    # Since 0.24 it warns of an option of its own that isn't set.
    suite.assert_quiet(allowed="DeprecationWarning|warnings.warn")
    # Not all were there long enough to say goodbye.
    await programs.assert_nothing_left(closed=False)
