"""TensorBoard's files of a run, for `tensorboard --logdir`. The package is tensorboardX: no TensorFlow."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

NAMES = {  # of what an update reports, in groups
    "loss": "loss/all", "instance_loss": "loss/instance", "class_loss": "loss/class",
    "learning_rate": "training/learning_rate", "gradient_norm": "training/gradient_norm",
    "loss_scale": "training/loss_scale", "skipped": "training/skipped",
    "images_per_second": "speed/images_per_second", "memory_gb": "speed/memory_gb",
}  # fmt: skip


class Boards:
    """Writes what updates report, and validation images. Of what an earlier start wrote after `global_step`
    TensorBoard shows nothing.
    """

    def __init__(self, folder: Path, global_step: int) -> None:
        from tensorboardX import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=global_step + 1)

    def write(self, report: Mapping[str, float]) -> None:
        for name, tag in NAMES.items():
            self.writer.add_scalar(tag, float(report[name]), report["global_step"])

    def write_grid(self, grid: np.ndarray, update: int) -> None:
        """(H, W, 3) uint8."""
        self.writer.add_image("validation", grid, update, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()
