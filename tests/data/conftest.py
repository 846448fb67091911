"""Real files, and a cache of `datasets` that belongs to the test session."""

import socket
from pathlib import Path
from typing import NoReturn

import datasets
import pytest

from helpers.sample_rows import make_rows


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory):
    """Nothing is left in, or read from, the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> NoReturn:
        pytest.fail("a local path was looked for on the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    """A csv file of 100 rows."""
    file = tmp_path / "reviews.csv"
    datasets.Dataset.from_dict(make_rows(100)).to_csv(file)
    return file
