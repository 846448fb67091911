"""What a task's own Trainer takes over from the settings that hold for all tasks."""

from pathlib import Path

from helpers.tiny import QUIET
from lightning_drm.training.task_fit import TaskFit


def test_a_setting_of_null_is_obeyed(tmp_path: Path):
    """Without it, Lightning would validate after every epoch, and refuse an interval that is longer than one."""
    arguments = {**QUIET, "strategy": "auto", "check_val_every_n_epoch": None, "val_check_interval": 1000}
    trainer = TaskFit("a", tmp_path, arguments, [], {}).trainer([])
    assert trainer.check_val_every_n_epoch is None
    assert trainer.val_check_interval == 1000
