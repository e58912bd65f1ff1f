"""What a user installs: the wheel's metadata and files, built as pip builds it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

import channels_rabbitmq

ROOT = Path(__file__).resolve().parents[2]
PYTHONS = ["3.10", "3.11", "3.12", "3.13", "3.14", "3.15"]


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source archive, made in a clean copy, and the wheel made from that."""
    folder = tmp_path_factory.mktemp("packaging")
    copy = folder / "copy"
    shutil.copytree(
        ROOT,
        copy,
        ignore=shutil.ignore_patterns(
            ".*", "__pycache__", "*.egg-info", "build", "dist", "certs", "node_modules"
        ),
    )
    result = subprocess.run(
        [sys.executable, "-m", "build", "--outdir", str(folder / "dist"), str(copy)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    return folder / "dist"


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    wheels = list(dist.glob("*.whl"))
    assert [path.name for path in wheels] == [
        f"channels_rabbitmq-{channels_rabbitmq.__version__}-py3-none-any.whl"
    ]
    return wheels[0]


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return Parser().parsestr(archive.read(name).decode())


def requirements(metadata: Message, extra: str | None) -> set[str]:
    """What the wheel requires, by itself or for an extra, with sorted version limits."""
    found = set()
    for line in metadata.get_all("Requires-Dist", []):
        requirement, _, marker = line.partition(";")
        match = re.search("extra == [\"'](.*)[\"']", marker)
        if (match.group(1) if match else None) == extra:
            parts = re.fullmatch(r"([\w-]+)(.*)", requirement.strip())
            assert parts is not None
            found.add(parts.group(1) + ",".join(sorted(parts.group(2).split(","))))
    return found


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_metadata(metadata: Message) -> None:
    assert metadata["Name"].replace("-", "_") == "channels_rabbitmq"
    assert metadata["Version"] == channels_rabbitmq.__version__
    assert metadata["Requires-Python"] == ">=3.10"
    assert "MIT" in (metadata["License-Expression"], metadata["License"])
    assert metadata["License-File"] == "LICENSE"
    assert metadata["Description-Content-Type"] == "text/x-rst"
    classifiers = metadata.get_all("Classifier", [])
    named = [classifier.rpartition(" :: 3.") for classifier in classifiers]
    assert [f"3.{minor}" for _, separator, minor in named if separator] == PYTHONS
    assert "Framework :: Django" in classifiers
    assert "Typing :: Typed" in classifiers
    readme = (ROOT / "README.rst").read_text(encoding="utf-8")
    assert str(metadata.get_payload()).strip() == readme.strip()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_requirements(metadata: Message) -> None:
    assert requirements(metadata, None) == {
        "asgiref<4,>=3.6",
        "carehare<2,>=1",
        "channels>=4.0",
        "msgpack<2,>=1",
        "pamqp<5,>=3.3",
    }
    extras = ["cryptography", "dev", "docs", "prometheus", "tests"]
    assert sorted(metadata.get_all("Provides-Extra", [])) == extras  # setuptools has any order
    assert requirements(metadata, "cryptography") == {"cryptography>=3.4"}
    assert requirements(metadata, "prometheus") == {"prometheus-client>=0.20"}
    dev = requirements(metadata, "dev")
    names = {re.split("[<>=~]", line)[0] for line in dev}
    assert {"pytest", "hypothesis", "mypy", "ruff", "cryptography"} <= names
    assert dev <= requirements(metadata, "tests")
    [urls] = [dict(line.split(", ") for line in metadata.get_all("Project-URL", []))]
    assert {"Changelog", "Issues", "Source"} <= set(urls)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_files_of_the_wheel(dist: Path, wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        tops = {name.partition("/")[0] for name in archive.namelist()}
    copy = dist.parent / "copy"
    expected = {
        path.relative_to(copy).as_posix()
        for path in (copy / "channels_rabbitmq").rglob("*")
        if path.is_file()
    }
    assert names == expected
    assert "channels_rabbitmq/py.typed" in names
    assert "channels_rabbitmq/_amqp/__init__.py" in names
    assert tops == {
        "channels_rabbitmq",
        f"channels_rabbitmq-{channels_rabbitmq.__version__}.dist-info",
    }


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_source_archive_holds_the_tests(dist: Path) -> None:
    [path] = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for name in (
        "LICENSE",
        "README.rst",
        "CHANGELOG.rst",
        "docs/conf.py",
        "docs/index.rst",
        "pyproject.toml",
        "setup.py",
        "channels_rabbitmq/py.typed",
        "tools/private_broker.py",
        "tests/system/test_packaging.py",
    ):
        assert name in names
    assert not [name for name in names if name.startswith("ssl/certs") or name.endswith(".pyc")]


def test_the_metadata_stand_in_setup_py_alone() -> None:
    """With a [project] table in pyproject.toml the wheel silently loses its requirements."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert not re.search(r"^\[project[\].]", text, re.MULTILINE)


def test_ci_and_the_manual_name_the_same_pythons() -> None:
    tox, travis, github, manual = (
        (ROOT / name).read_text(encoding="utf-8")
        for name in (
            "tox.ini",
            ".travis.yml",
            ".github/workflows/tests.yml",
            "docs/reference/versions.rst",
        )
    )
    environments = ",".join(version.replace(".", "") for version in PYTHONS)
    assert f"py{{{environments}}}-{{oldest,newest}}" in tox
    assert f"python: {json.dumps(PYTHONS)}" in travis
    assert f"python: {json.dumps(PYTHONS)}" in github
    assert f"\nPython {PYTHONS[0]} to {PYTHONS[-1]}, Channels" in manual


def test_ci_and_the_manual_name_the_same_brokers() -> None:
    travis, github, manual = (
        (ROOT / name).read_text(encoding="utf-8")
        for name in (".travis.yml", ".github/workflows/tests.yml", "docs/reference/versions.rst")
    )
    brokers = re.findall(r"RABBITMQ=rabbitmq:([\d.]+)", travis)
    assert f"rabbitmq: {json.dumps(brokers)}" in github
    *others, last = brokers
    assert f"tested with {', '.join(others)} and {last}" in " ".join(manual.split())
