"""Models of which one block is exchanged, put together by hand."""

import pandas as pd
import pytest

from helpers.three_tasks import CLASSES, ThreeTasks
from lightning_drm import DRM
from lightning_drm.analysis.layers import CHANGE, Layers, grouped

BLOCKS = {"backbone.0": "backbone.0.", "backbone.1": "backbone.1.", "backbone.3": "backbone.3."}


def test_scores_of_models_with_one_block_exchanged(three_tasks: ThreeTasks):
    (finding,) = three_tasks.analyze(Layers())
    columns = ["task", "block", "in place of the merged delta"]
    table = pd.read_csv(finding.table).set_index(columns)[CHANGE]
    merged = three_tasks.merged(DRM(density=0.5))
    assert len(table) == len(CLASSES) * len(BLOCKS) * 2
    for task in CLASSES:
        own = three_tasks.deltas(task)
        for block, prefix in BLOCKS.items():
            rest = {name: delta for name, delta in merged.items() if not name.startswith(prefix)}
            kept = {name: delta for name, delta in own.items() if name.startswith(prefix)}
            whole = three_tasks.normalized(merged, task)
            for what, deltas in (("own delta", {**rest, **kept}), ("base", rest)):
                expected = 100 * (three_tasks.normalized(deltas, task) - whole)
                assert table[task, block, what] == pytest.approx(expected, abs=1e-4)
    assert len(table.round(4).unique()) > 4, "the case shows nothing"
    task, block, _ = table.xs("own delta", level=2, drop_level=False).idxmax()
    assert f"costs {task} most in {block}" in finding.sentence


def test_blocks_come_in_the_order_of_depth_with_what_is_outside_first():
    names = ["encoder.layer.10.w", "encoder.layer.2.w", "encoder.layer.2.attention.0.w", "pooler.w"]
    kinds = dict.fromkeys(names, "matrix") | {"words.w": "embedding"}
    assert grouped(kinds) == {
        "embeddings": ["words.w"],
        "outside blocks": ["pooler.w"],
        "layer.2": ["encoder.layer.2.w", "encoder.layer.2.attention.0.w"],
        "layer.10": ["encoder.layer.10.w"],
    }
