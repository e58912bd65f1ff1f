"""The metadata of channels_rabbitmq; the settings of the tools are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def read_version() -> str:
    """The version, read without importing: the requirements may not be installed yet."""
    text = (ROOT / "channels_rabbitmq" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if match is None:
        raise RuntimeError("channels_rabbitmq/__init__.py holds no __version__")
    return match.group(1)


CRYPTOGRAPHY = "cryptography>=3.4"
PROMETHEUS = "prometheus-client>=0.20"
REPOSITORY = "https://github.com/CJWorkbench/channels_rabbitmq"

# What a first patch needs: the tests without a broker, lint and types. A new release of a linter
# must not fail an old commit.
DEV = [
    CRYPTOGRAPHY,
    PROMETHEUS,
    "hypothesis>=6.100",
    "mypy~=2.4.1",
    "pytest>=8.2",
    "pytest-asyncio>=1.0",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    "ruff~=0.17.5",
]

# What builds docs/. Older Pythons get the newest Sphinx that they can run.
DOCS = ["furo>=2024.8,<2027", PROMETHEUS, "sphinx>=8.1,<10"]

setup(
    name="channels_rabbitmq",
    version=read_version(),
    description="Django Channels channel layer on RabbitMQ",
    long_description=(ROOT / "README.rst").read_text(encoding="utf-8"),
    long_description_content_type="text/x-rst",
    author="the channels_rabbitmq authors",
    license="MIT",
    url=REPOSITORY,
    project_urls={
        "Documentation": "https://channels-rabbitmq.readthedocs.io/",
        "Changelog": f"{REPOSITORY}/blob/main/CHANGELOG.rst",
        "Issues": f"{REPOSITORY}/issues",
        "Source": REPOSITORY,
    },
    packages=find_packages(include=["channels_rabbitmq", "channels_rabbitmq.*"]),
    package_data={"channels_rabbitmq": ["py.typed"]},
    zip_safe=False,
    python_requires=">=3.10",
    install_requires=[
        "asgiref>=3.6,<4",
        "carehare>=1,<2",
        "channels>=4.0",
        "msgpack>=1,<2",
        # Older ones refuse exchanges with a space in their names. carehare 1.0 takes none from 4.
        "pamqp>=3.3,<5",
    ],
    extras_require={
        "cryptography": [CRYPTOGRAPHY],
        "prometheus": [PROMETHEUS],
        "dev": DEV,
        "docs": DOCS,
        "tests": [
            *DEV,
            *DOCS,
            "build",
            "celery>=5.4",
            "daphne>=4.1",
            "docutils>=0.20",
            "granian>=2.5",
            "gunicorn>=22",
            "hypercorn>=0.17",
            "kombu>=5.3",
            "packaging",
            "pika>=1.3",
            "pyyaml>=6",
            "uvicorn>=0.30",
            "uvloop>=0.19",
            "websockets>=13",
        ],
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Web Environment",
        "Framework :: AsyncIO",
        "Framework :: Django",
        "Intended Audience :: Developers",
        "Operating System :: OS Independent",
        "Programming Language :: Python",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Programming Language :: Python :: 3.14",
        "Programming Language :: Python :: 3.15",
        "Topic :: Internet :: WWW/HTTP",
        "Typing :: Typed",
    ],
)
