"""Tiny pretrained language models with their tokenizers, and tasks that they learn; each made once, only read."""

from pathlib import Path

import datasets
import pytest

from helpers.tiny_language import COLORS, save_answers, save_counting, save_tiny_llama, save_tiny_t5
from lightning_drm.data import LanguageTask, SequenceTask


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory):
    """Nothing is left in, or read from, the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="session")
def t5(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_t5(tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_llama(tmp_path_factory.mktemp("llama"), pads=False)


@pytest.fixture
def answers(tmp_path: Path, t5: str) -> SequenceTask:
    """Inputs of two to six words, targets of one or two."""
    file = save_answers(tmp_path / "answers.csv", COLORS, 1)
    return SequenceTask(file, t5, max_new_tokens=4, batch_size=16)


@pytest.fixture
def counting(tmp_path: Path, llama: str) -> LanguageTask:
    """Texts of two to seven words, behind prompts of one to four."""
    file = save_counting(tmp_path / "counting.csv", COLORS, 1)
    return LanguageTask(file, llama, prompt_column="prompt", batch_size=16)
