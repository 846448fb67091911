"""Models of one family whose vocabularies differ: which row of a task's embedding is which row of the base's."""

import filecmp
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

VocabularyPolicy = Literal["strict", "base", "intersection"]
"""Refuse; keep the base's tokens, of which a task leaves those unchanged that it lacks; merge only what all have."""


def token_rows(base: Path | None, task: Path | None) -> dict[int, int] | None:
    """Which row of the task's embedding stands for which row of the base's.

    Args:
        base: The base's folder.
        task: The task's folder.

    Returns:
        By row of the base, the task's row, for the tokens that both have; ``None`` if the two tokenizers agree, or one
        of them is missing.

    Raises:
        ValueError: If a tokenizer is damaged.
    """
    ours, theirs = _tokenizer_file(base), _tokenizer_file(task)
    if base is None or task is None or ours is None or theirs is None:
        return None
    if ours.name == theirs.name and filecmp.cmp(ours, theirs, shallow=False):
        return None
    base_ids, task_ids = _token_ids(base), _token_ids(task)
    if base_ids == task_ids:
        return None
    return {row: task_ids[token] for token, row in base_ids.items() if token in task_ids}


def row_map(rows: dict[int, int] | None, num_base: int, num_task: int) -> Tensor | None:
    """For each row of the base's parameter, the task's row, or -1 if there is none; ``None`` if rows are the same.

    Args:
        rows: From `token_rows`; without it, rows with the same number stand for the same token.
        num_base: Number of rows of the base's parameter.
        num_task: Number of rows of the task's parameter.
    """
    if rows is None and num_base == num_task:
        return None
    known = rows if rows is not None else {row: row for row in range(min(num_base, num_task))}
    mapped = torch.full((num_base,), -1)
    for base_row, task_row in known.items():
        if base_row < num_base and task_row < num_task:
            mapped[base_row] = task_row
    if rows is not None:  # rows beyond both vocabularies are padding, the same in both
        used_base, used_task = max(rows, default=-1) + 1, max(rows.values(), default=-1) + 1
        if used_base == used_task and num_base == num_task:
            mapped[used_base:] = torch.arange(used_base, num_base)
    same = num_base == num_task and bool((mapped == torch.arange(num_base)).all())
    return None if same else mapped


def _token_ids(folder: Path) -> dict[str, int]:
    from transformers import AutoTokenizer

    try:
        ids: dict[str, int] = AutoTokenizer.from_pretrained(folder, trust_remote_code=False).get_vocab()
    except Exception as error:  # tokenizers raises nothing more special for a damaged file
        raise ValueError(
            f"{folder} has a tokenizer that cannot be read: {' '.join(str(error).split())[:200]}"
        ) from error
    return ids


def _tokenizer_file(folder: Path | None) -> Path | None:
    if folder is None:
        return None
    names = ("tokenizer.json", "vocab.txt", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model")
    return next((folder / name for name in names if (folder / name).is_file()), None)
