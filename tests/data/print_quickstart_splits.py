"""Run by test_quickstart_tasks: makes every split anew, in a cache of its own, and prints it."""

import json
import sys
from pathlib import Path
from typing import get_args

import datasets

from lightning_drm.data import QuickstartTask
from lightning_drm.data.quickstart.task import Source

if __name__ == "__main__":
    datasets.config.HF_DATASETS_CACHE = Path(sys.argv[1])
    tasks = {source: QuickstartTask(source) for source in get_args(Source)}
    print(json.dumps({name: {s: rows["text"][:] for s, rows in task.rows.items()} for name, task in tasks.items()}))
