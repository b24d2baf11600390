"""2,000 Fashion-MNIST images (Zalando SE, MIT licence) in ten class folders, to try the tool on."""

import shlex
import shutil
import zipfile
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

from data2vec_vision.errors import InputError

ARCHIVE = "fashion_mnist_2000.zip"


def names() -> list[str]:
    """The images' names, "<class>/<number>.png", sorted."""
    with files(__name__).joinpath(ARCHIVE).open("rb") as file, zipfile.ZipFile(file) as archive:
        return sorted(archive.namelist())


def write_samples(directory: str, wanted: Callable[[str], bool] = lambda name: True) -> str:
    """Write the `wanted` images below `directory`, and their licence; returns what to tell the user.

    Files of the same names are replaced, so a second call repairs the folder. Raises InputError when
    `directory` cannot be written.
    """
    target = Path(directory)
    try:
        target.mkdir(parents=True, exist_ok=True)
        with files(__name__).joinpath(ARCHIVE).open("rb") as file, zipfile.ZipFile(file) as archive:
            chosen = [name for name in sorted(archive.namelist()) if wanted(name)]
            archive.extractall(target, chosen)
        with files(__name__).joinpath("LICENSE").open("rb") as source, (target / "LICENSE").open("wb") as copy:
            shutil.copyfileobj(source, copy)
    except OSError as error:
        raise InputError(f"cannot write to {directory}: {error.strerror}; give another folder") from error
    classes = len({name.split("/")[0] for name in chosen})
    small = "--image-size 28 --patch-size 7 --hidden-dim 128 --n-encoders 4"
    return (
        f"Wrote {len(chosen):,} images of {classes} classes to {directory}.\n"
        f"Next: python -m data2vec_vision train {shlex.quote(directory)} {small}"
    )
