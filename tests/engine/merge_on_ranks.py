"""Run by each of several processes: does the merges that a JSON file lists, all together."""

import json
import sys
from pathlib import Path

from lightning_drm import DARETIES, DRM, TIES, TaskArithmetic  # noqa: F401 - named in the file
from lightning_drm.engine import Override, Recipe, Rules, merge_files  # noqa: F401
from lightning_drm.launch import started_together

if __name__ == "__main__":
    with Path(sys.argv[1]).open() as file, started_together() as ranks:
        for case in json.load(file):
            paths = {key: case[key] for key in ("base", "models", "output", "max_shard_size", "device")}
            merge_files(**paths, recipe=eval(case["recipe"]), rules=eval(case["rules"]), ranks=ranks)
