"""Finetunes of three small tasks that cannot all be right, each with a snapshot; only read."""

import pytest
from helpers.three_tasks import ThreeTasks, finetuned


@pytest.fixture(scope="session")
def three_tasks(tmp_path_factory: pytest.TempPathFactory) -> ThreeTasks:
    return finetuned(tmp_path_factory.mktemp("three"))
