"""Where a run's figures go beside metrics.jsonl: TensorBoard where it is installed, Weights & Biases on request."""

import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data2vec_vision import distributed
from data2vec_vision.config import TrainConfig, to_json
from data2vec_vision.errors import InputError, one_line

GROUPS = {  # the first figures that somebody looks for, first
    "train": ("loss", "lr", "tau", "grad_norm"),
    "speed": ("images_per_second", "data_wait"),
    "files": ("skipped", "bad_files"),
}


class Loggers:
    """Both, or as many as there are; in the first process only."""

    def __init__(self, config: TrainConfig, folder: Path, first_step: int):
        self._tensorboard = self._wandb = None
        if not distributed.is_main():
            return
        if not config.no_tensorboard:
            self._tensorboard = tensorboard_writer(folder, first_step)
        if config.wandb:
            self._wandb = wandb_run(config, folder, first_step)

    @property
    def pictures(self) -> bool:
        """Whether anybody looks at pictures."""
        return self._tensorboard is not None or self._wandb is not None

    def log(self, record: Mapping[str, Any]) -> None:
        """The numbers of a line of metrics.jsonl."""
        numbers = {name: value for name, value in record.items() if isinstance(value, int | float)}
        values = {tag(name): value for name, value in numbers.items() if name not in ("step", "steps")}
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, record["step"])
        if self._wandb is not None:
            self._wandb.log(values, step=record["step"])

    def picture(self, name: str, image: Image.Image, step: int) -> None:
        if self._tensorboard is not None:
            self._tensorboard.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")
        if self._wandb is not None:
            import wandb

            self._wandb.log({name: wandb.Image(image)}, step=step)

    def text(self, name: str, text: str, step: int) -> None:
        if self._tensorboard is not None:
            self._tensorboard.add_text(name, text, step)
        if self._wandb is not None:
            self._wandb.summary[name] = text

    def close(self) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def tag(name: str) -> str:
    """The name of a figure with the group that it is shown in: loss -> train/loss."""
    return f"{next((group for group, names in GROUPS.items() if name in names), 'monitors')}/{name}"


def tensorboard_writer(folder: Path, first_step: int) -> Any:
    """A writer of event files in the run's folder, or None without tensorboard. Later events of an earlier try go."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else None)


def wandb_run(config: TrainConfig, folder: Path, first_step: int) -> Any:
    """A run of Weights & Biases under the folder's name, which a resumed run continues."""
    try:
        import wandb
    except ImportError as error:
        raise InputError("--wandb needs wandb: pip install wandb") from error
    known = folder / "wandb_id.txt"
    identity = known.read_text().strip() if first_step and known.exists() else uuid.uuid4().hex
    try:
        run = wandb.init(
            project=config.wandb,
            name=folder.name,
            dir=str(folder),
            id=identity,
            resume="allow",
            config=json.loads(to_json(config)),
        )
    except Exception as error:  # no account, no network, no right to the project
        raise InputError(
            f"--wandb {config.wandb}: {one_line(error)}; try `wandb login`, or leave out --wandb"
        ) from error
    known.write_text(identity)
    return run
