"""Run by test_quickstart_tasks: makes every split anew, in a cache of its own, and prints it."""

import json
import sys
from pathlib import Path
from typing import get_args

import datasets

from lightning_drm.data import QuickstartTask, QuickstartWordsTask
from lightning_drm.data.quickstart.source import TextSource, WordsSource

if __name__ == "__main__":
    datasets.config.HF_DATASETS_CACHE = Path(sys.argv[1])
    tasks = {source: QuickstartTask(source) for source in get_args(TextSource)}
    tasks |= {source: QuickstartWordsTask(source) for source in get_args(WordsSource)}
    print(json.dumps({name: {s: rows["text"][:] for s, rows in task.rows.items()} for name, task in tasks.items()}))
