"""Run by test_launch, in whatever way processes are started: one rank or all of them end, and the others wait for them.

    launched.py FOLDER DEED VICTIM [COUNT]

The deed is "dies" or "fails", the victim a rank or "all". With a count it starts that many processes of its own.
"""

import os
import signal
import sys
import time
from pathlib import Path

from lightning_drm.distributed import launch, watch


def main(folder: Path, deed: str, victim: str) -> None:
    watch.GRACE = 2.0  # instead of 10 seconds
    with launch.started_together() as ranks:
        (folder / f"{ranks.rank}.pid").write_text(str(os.getpid()))
        ranks.wait()
        if victim in ("all", str(ranks.rank)):
            if deed == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError(f"NaN on rank {ranks.rank}.")
        time.sleep(600)


if __name__ == "__main__":
    folder, deed, victim, *count = sys.argv[1:]
    try:
        if count:
            launch.run_processes([__file__, folder, deed, victim], int(count[0]))
        else:
            main(Path(folder), deed, victim)
    except ValueError as error:
        print(f"lightning-drm: {error}", file=sys.stderr)
        sys.exit(2)
