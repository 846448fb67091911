"""Run by test_nodes on one process, and on four on two nodes: fits, merges and tests two tasks, and merges again.

    torchrun --nnodes 2 --nproc_per_node 2 … on_nodes.py FOLDER

FOLDER and what is left in it are those of `together.py`.
"""

import os
import sys
from pathlib import Path

import torch

from distributed.together import copy_of_alone, merge_again, run


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    out = folder / f"{os.environ['BACKEND']}{size}"
    for strategy in ("alone",) if size == 1 else ("ddp", "fsdp2"):
        run(folder, out / f"{strategy}_full", strategy, size, lora=False)
        again = out / f"{strategy}_again"
        copy_of_alone(folder, again)
        merge_again(folder, again, "drm", strategy, size)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
