"""The floors of the package: its parts import downwards only, and nothing imports in a circle."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.imports import find_circles, read_imports

ROOT = Path(__file__).parents[2]
PACKAGE = "channels_rabbitmq"

# What each part may import of the others. A part is a folder, or a file of the package itself.
MAY_IMPORT = {
    # What a person runs. Nothing imports it.
    "__main__": {"_tools"},
    "management": {"_tools"},
    "_tools": {
        *("core", "_loop_layer", "_broker", "_amqp"),
        *("_futures", "_hooks", "_identity", "_settings"),
        *("exceptions", "statistics", "status"),
    },
    "apps": {"_tools"},
    # Beside what it is a stand-in for, it uses what is below that.
    "testing": {
        *("core", "_loops", "_loop_layer", "_inbox", "_broker", "_amqp"),
        *("_codec", "_futures", "_hooks", "_identity", "_reporter", "_settings"),
        *("exceptions", "presence", "statistics", "status"),
    },
    "lifespan": {"core", "exceptions"},
    "health": {"_configured", "_futures", "exceptions", "statistics"},
    "prometheus": {"_configured", "core", "exceptions", "statistics", "status"},
    "_configured": {"core"},
    "core": {
        *("_loops", "_codec", "_settings", "_names"),
        *("exceptions", "presence", "statistics", "status"),
    },
    "_loops": {
        *("_loop_layer", "_broker"),
        *("_hooks", "_identity", "_settings", "_futures"),
        *("exceptions", "presence", "statistics", "status"),
    },
    "_loop_layer": {
        *("_inbox", "_peers", "_broker"),
        *("_hooks", "_identity", "_loop_lag", "_reporter", "_settings"),
        *("presence", "statistics", "status"),
    },
    # The three wings don't know each other. What has arrived is sorted without any I/O.
    "_inbox": {
        *("_codec", "_identity", "_reporter", "_settings", "_windows"),
        *("statistics", "status"),
    },
    # Of the client it knows only what may become of a message.
    "_peers": {
        *("_amqp", "_codec", "_identity", "_names", "_reporter", "_settings", "_futures"),
        *("exceptions", "presence", "statistics", "status"),
    },
    "_broker": {
        *("_carehare", "_amqp"),
        *("_codec", "_functions", "_identity", "_reporter", "_settings", "_futures", "_threads"),
        *("exceptions", "statistics"),
    },
    "_carehare": {"_amqp", "_futures"},
    # The client knows nothing of the layer.
    "_amqp": {"_futures", "_threads"},
    "_settings": {"_amqp", "_codec", "_names", "_serializers"},
    "_hooks": {"_settings", "_functions", "_futures", "_threads"},
    "_codec": {"_plain_messages", "_serializers", "exceptions"},
    "_serializers": {"_functions", "_names", "_plain_messages"},
    "_plain_messages": {"_names"},
    "_threads": {"_futures"},
    "_functions": set(),
    "_futures": set(),
    "_identity": set(),
    "_loop_lag": {"_futures", "_windows"},
    "_names": set(),
    "_reporter": {"_futures"},
    "_windows": set(),
    "exceptions": set(),
    "presence": set(),
    "statistics": set(),
    "status": {"statistics"},
}
IMPORTS = read_imports(ROOT / PACKAGE)
TEST_IMPORTS = read_imports(ROOT / "tests")


def _part(module: str) -> str:
    return module.removeprefix(f"{PACKAGE}.").partition(".")[0]


def test_each_part_has_its_floor() -> None:
    assert {_part(module) for module in IMPORTS if module != PACKAGE} == set(MAY_IMPORT)


def test_parts_import_downwards_only() -> None:
    upwards = [
        f"{module} imports {imported}"
        for module, all_imported in IMPORTS.items()
        for imported in all_imported
        if imported in IMPORTS and PACKAGE not in (module, imported)
        if _part(imported) not in {_part(module), *MAY_IMPORT[_part(module)]}
    ]
    assert upwards == []


def test_each_allowance_is_used() -> None:
    """One that nothing uses hides the next import that shouldn't be."""
    used = {
        (_part(module), _part(imported))
        for module, all_imported in IMPORTS.items()
        for imported in all_imported
        if imported in IMPORTS
    }
    allowed = {(part, other) for part, others in MAY_IMPORT.items() for other in others}
    assert allowed - used == set()


def test_the_floors_have_no_circle_themselves() -> None:
    assert find_circles(MAY_IMPORT) == []


def test_processes_talk_to_each_other_without_the_client() -> None:
    peers = {
        name
        for module, imported in IMPORTS.items()
        for name in imported
        if _part(module) == "_peers" and _part(name) == "_amqp"
    }
    assert peers == {f"{PACKAGE}._amqp.publishing"}  # for Outcome


def test_only_the_client_makes_frames() -> None:
    users = {
        module.removeprefix(f"{PACKAGE}.")
        for module, imported in IMPORTS.items()
        if any(name.partition(".")[0] == "pamqp" for name in imported) and _part(module) != "_amqp"
    }
    assert users == set()


def test_only_what_is_public_of_carehare_is_used() -> None:
    private = [
        f"{module} imports {name}"
        for module, imported in IMPORTS.items()
        for name in imported
        if name.startswith("carehare.")
    ]
    assert private == []


@pytest.mark.parametrize("package", [PACKAGE, "benchmarks", "soak", "tools"])
def test_nothing_imports_in_a_circle(package: str) -> None:
    """Not behind TYPE_CHECKING either: what is read together is one thing."""
    assert find_circles(read_imports(ROOT / package)) == []


def test_a_circle_would_be_found() -> None:
    imports = {"a": {"b"}, "b": {"c", "os"}, "c": {"b"}, "d": {"a"}}
    assert find_circles(imports) == [["b", "c"]]


def test_no_test_is_imported_by_another() -> None:
    """What several tests need is in tests.support."""
    assert [
        f"{module} imports {name}"
        for module, imported in TEST_IMPORTS.items()
        for name in imported
        if name.rpartition(".")[2].startswith("test_")
    ] == []


def test_the_unit_tests_need_no_broker() -> None:
    assert [
        module
        for module, imported in TEST_IMPORTS.items()
        if module.startswith("tests.unit.") and "tests.support.brokers" in imported
    ] == []
