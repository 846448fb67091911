"""Run by each of several processes: does the merges that a JSON file lists, all together."""

import json
import sys
from pathlib import Path

from lightning_drm import fusion, merging
from lightning_drm.checkpoints.merge import merge_files
from lightning_drm.checkpoints.planning import MismatchPolicy
from lightning_drm.distributed.launch import started_together

if __name__ == "__main__":
    names = {**vars(merging), **vars(fusion), "MismatchPolicy": MismatchPolicy}
    with Path(sys.argv[1]).open() as file, started_together() as ranks:
        for case in json.load(file):
            paths = {key: case[key] for key in ("base", "models", "output", "max_shard_size", "device")}
            recipe, mismatch = eval(case["recipe"], names), eval(case["mismatch"], names)
            merge_files(**paths, recipe=recipe, mismatch=mismatch, ranks=ranks)
