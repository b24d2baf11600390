"""`--resume-checkpoint auto`: a run goes on with its folder's newest checkpoint, or begins where there is none.

The same command may so be given again and again, as a scheduler does. The main process chooses and tells the others:
on a file system that machines share each may see another state of the folder for some seconds, and processes that
chose by themselves could go on from different steps. It also reads the file for all (plan.restore).
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from data2vec_vision import checkpoint, distributed
from data2vec_vision.config import TrainConfig, default_folder, read_config
from data2vec_vision.errors import InputError
from data2vec_vision.run import say

AUTO = "auto"


def found(config: TrainConfig, given: Mapping[str, Any]) -> tuple[TrainConfig, Mapping[str, Any]]:
    """`config` with the newest checkpoint in place of auto, None for a fresh run, and the settings that it must not
    contradict: those `given`, the typed ones, and where there is a --config, those of that file.

    Raises InputError where it is not known which folder is meant.
    """
    if not (config.inputs or config.checkpoint_out_dir):
        raise InputError("--resume-checkpoint auto looks in the output folder; give INPUT_PATH or --checkpoint-out-dir")
    folder = Path(config.checkpoint_out_dir or default_folder(config.inputs, config.method))
    path, step = distributed.from_main(lambda: newest(folder))
    if path is None:
        say(f"There is no checkpoint in {folder} to go on with; a fresh run begins.")
        return replace(config, resume_checkpoint=None), given
    say(f"The newest checkpoint in {folder} is {path.name}, of step {step:,}; the run goes on from there.")
    if config.config:
        path_of_config = config.config
        given = distributed.from_main(lambda: read_config(path_of_config, given))
    return replace(config, resume_checkpoint=str(path), config=None), given


def newest(folder: Path) -> tuple[Path | None, int]:
    """The checkpoint of the most steps, and their number; (None, 0) where there is none to go on with.

    One that cannot be read is passed over, which is said. Raises InputError where that is so of all: they may be of a
    newer version, or on a disk that does not answer, and a run that began anew would replace them.
    """
    steps: dict[Path, int] = {}
    unread = []
    for path in folder.glob("checkpoint_*.pt"):
        if re.fullmatch(r"checkpoint_(last|\d+)\.pt", path.name):
            try:
                steps[path] = checkpoint.read_training(path, mmap=True)["step"]
            except InputError as error:
                unread.append(str(error))
    if steps:  # of the same step the rolling one, whose name the user knows from other messages
        for reason in unread:
            say(f"note: passed over: {reason}")
        path = max(steps, key=lambda p: (steps[p], p.name))
        return path, steps[path]
    if unread:
        raise InputError(
            f"none of the checkpoints in {folder} can be read: {'; '.join(unread)}. "
            "Mend that, or move them away to begin a fresh run"
        )
    return None, 0
