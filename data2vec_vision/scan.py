"""A look at every image before training: what cannot be read, what comes twice, what is large, what to train with."""

import json as json_format
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader
from tqdm import tqdm

from data2vec_vision.checkpoint import atomic_write, check_place
from data2vec_vision.config import inputs_of
from data2vec_vision.data import start_worker
from data2vec_vision.device import cores, device_memory, find_device
from data2vec_vision.duplicates import alike_groups, equal_groups
from data2vec_vision.errors import InputError, RunFailed, Stopped, one_line
from data2vec_vision.inventory import CLEAN, Findings, advice, shown, suggest, table, to_json, train_command
from data2vec_vision.pictures import Tile, grid
from data2vec_vision.run import caught_signals, plural, say
from data2vec_vision.sources import LIST_SUFFIXES, ImageFolder, open_source, read_image
from data2vec_vision.survey import Chunks, Survey

PAIRS, COLUMNS = 24, 8  # of the picture
COPY, ALIKE = (200, 60, 60), (230, 160, 40)  # frames


def scan(
    input_path: str | Sequence[str],
    json: str | None = None,
    write_list: str | None = None,
    keep_duplicates: bool = False,
    drop_near_duplicates: bool = False,
    picture: str | None = None,
    workers: int | None = None,
) -> Findings:
    """Look at all images of `input_path`, one or several of what `open_source` takes; say and return what was found.

    json: a file for everything that was found. write_list: a .txt file for the clean list, which `train` takes.
    picture: a .png file for examples of duplicates. workers: processes that read, all cores if None. Raises InputError
    for a path without a readable image or an output that cannot be, RunFailed when an output cannot be written
    after all, and Stopped after a signal.
    """
    check_options(write_list, keep_duplicates, drop_near_duplicates)
    outputs = {"--json": json, "--write-list": write_list, "--picture": picture}
    outputs = {option: path for option, path in outputs.items() if path is not None}
    check_outputs(outputs)
    inputs = inputs_of(input_path)
    source, shown_inputs = open_source(inputs), ", ".join(inputs)
    if picture is not None and source.would_take_in(picture):
        raise InputError(f"--picture {picture} would become one of the images; write it outside {shown_inputs}")
    lines = ListLines(source, write_list) if write_list is not None else None
    found = look_at_all(source, inputs, cores() if workers is None else workers)
    device = find_device(None)
    options, reasons = suggest(found.short_side, len(found.survey.readable), device.type, device_memory(device))
    train = train_command([write_list or CLEAN] if write_list or found.needs_a_list else inputs, options)
    print_rows(table(found))
    try:
        if json is not None:
            with atomic_write(json) as file:
                file.write(json_format.dumps(to_json(found, options, train), indent=1).encode())
            say_row("Wrote", f"{json}: all of this, with all names")
        if lines is not None:
            write_clean_list(found, lines, write_list, keep_duplicates, drop_near_duplicates)
        if picture is not None:
            draw(found, picture)
    except OSError as error:
        raise RunFailed(f"cannot write the output: {one_line(error)}; make room or choose another place") from error
    say_row("Suggested", "; ".join(f"--{name} {options[name]}: {reason}" for name, reason in reasons.items()))
    say("")
    print_rows(advice(found, outputs))
    say_row("To train", train)
    return found


def check_options(write_list: str | None, keep_duplicates: bool, drop_near_duplicates: bool) -> None:
    """Raises InputError for options that cannot be meant together."""
    for given, name in ((keep_duplicates, "--keep-duplicates"), (drop_near_duplicates, "--drop-near-duplicates")):
        if given and write_list is None:
            raise InputError(f"{name} says what the clean list holds; add --write-list FILE")
    if keep_duplicates and drop_near_duplicates:
        raise InputError("--keep-duplicates and --drop-near-duplicates contradict each other; give one of them")


def check_outputs(outputs: dict[str, str]) -> None:
    """Raises InputError unless each file, by its option, can be written."""
    for option, path in outputs.items():
        suffixes = {"--write-list": LIST_SUFFIXES, "--picture": (".png",)}.get(option, (".json",))
        target = Path(path)
        if target.suffix.lower() not in suffixes:
            raise InputError(f"{option} {path} must end in {' or '.join(suffixes)}")
        check_place(option, target)


def look_at_all(source: ImageFolder, inputs: Sequence[str], workers: int) -> Findings:
    """Raises InputError when no image can be read, RunFailed when a worker dies, Stopped after a signal."""
    chunks = Chunks(source)
    workers = min(workers, len(chunks))
    loader = DataLoader(chunks, batch_size=None, num_workers=workers, collate_fn=as_it_is, worker_init_fn=start_worker)
    survey, start = Survey.of(len(source)), time.perf_counter()
    with caught_signals() as signals, progress(len(source), "looking") as bar:
        try:
            for part in loader:
                survey.add(part)
                bar.update(len(part.records))
                if signals:
                    raise Stopped(signals[0], "Stopped; nothing was written")
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise RunFailed(
                f"a process that reads images was killed, for want of memory perhaps; try --workers {workers // 2}"
            ) from error
    seconds = time.perf_counter() - start
    if len(survey.readable) == 0:
        reason = survey.bad[0]
        raise InputError(f"none of the {len(source):,} images in {', '.join(inputs)} can be read; the first: {reason}")
    copies = equal_among(survey.readable, survey.records["content"])
    return Findings(source, tuple(inputs), survey, copies, alike_images(survey, copies), seconds, workers)


def as_it_is(part: Any) -> Any:
    """In place of the loader's own function, which would make tensors of arrays."""
    return part


def progress(total: int, what: str, steps: Iterable[int] | None = None) -> tqdm:
    """A bar on a terminal, nothing elsewhere."""
    return tqdm(steps, what, total, unit="image", dynamic_ncols=True, leave=False, disable=not sys.stderr.isatty())


def equal_among(indices: np.ndarray, contents: np.ndarray) -> list[np.ndarray]:
    return [indices[group] for group in equal_groups(contents[indices])]


def alike_images(survey: Survey, copies: list[np.ndarray]) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """Groups of images that look alike, without those that are copies of another."""
    compared = survey.records["width"] > 0
    for group in copies:
        compared[group[1:]] = False
    indices = np.flatnonzero(compared)
    looks = np.ascontiguousarray(survey.records["look"][indices])
    groups = alike_groups(looks, lambda steps: progress(len(steps), "comparing", steps))
    return [(int(indices[first]), indices[others], bits) for first, others, bits in groups]


class ListLines:
    """The lines of a clean list: paths relative to the list's folder for what is below it, else absolute.

    Raises InputError at once, before the work, for a name that a line cannot hold.
    """

    def __init__(self, source: ImageFolder, path: str):
        if not source.are_files:
            raise InputError(
                "--write-list: a list names files, and these images lie in archives; leave it out, or unpack them"
            )
        self.source, self.base = source, os.path.join(os.path.abspath(os.path.dirname(path)), "")
        for index in range(len(source)):
            if "\n" in (line := self[index]) or "\r" in line:
                raise InputError(
                    f"the name {source.name(index)!r} has a line break, which a list cannot hold; "
                    "rename that file, or leave out --write-list"
                )

    def __getitem__(self, index: int) -> str:
        return self.source.path(index).removeprefix(self.base).replace(os.sep, "/")


def write_clean_list(
    found: Findings, lines: ListLines, path: str, keep_duplicates: bool, drop_near_duplicates: bool
) -> None:
    kept = found.kept(keep_duplicates, drop_near_duplicates)
    with atomic_write(path) as file:
        for index in kept:
            file.write((lines[index] + "\n").encode("utf-8", "surrogateescape"))
    without = left_out(found, len(kept), drop_near_duplicates)
    say_row("Wrote", f"{path}: {len(kept):,} of {len(found.source):,} images, {without}")
    if found.near_duplicates and not drop_near_duplicates:
        say_row("", f"the {found.near_duplicates:,} near duplicates are in it; --drop-near-duplicates leaves them out")


def left_out(found: Findings, kept: int, drop_near_duplicates: bool) -> str:
    bad, total = len(found.survey.bad), len(found.source)
    if kept == total:
        return "all of them"
    alike = found.near_duplicates if drop_near_duplicates else 0
    parts = {"unreadable": bad, "exact copies": total - kept - bad - alike, "near duplicates": alike}
    return "without " + ", ".join(f"{count:,} {what}" for what, count in parts.items() if count)


def draw(found: Findings, path: str) -> None:
    """A picture of one pair of each group: copies first, then what looks alike, the most different pairs first."""
    copies = [(group[0], group[1], "copy", COPY) for group in found.copies]
    alike = [(first, others[bits.argmax()], bits.max()) for first, others, bits in found.alike]
    doubtful = [(*pair, f"{bits} bits differ", ALIKE) for *pair, bits in sorted(alike, key=lambda pair: -pair[2])]
    pairs = copies[: max(PAIRS // 3, PAIRS - len(doubtful))]
    pairs += doubtful[: PAIRS - len(pairs)]
    if not pairs:
        say_row("Picture", f"no duplicates to draw, so {path} was not written")
        return
    sheet = [tile for pair in pairs for tile in tiles(found.source, *pair)]
    rows = [sheet[start : start + COLUMNS] for start in range(0, len(sheet), COLUMNS)]
    count = f"{len(pairs):,} of {plural(len(copies) + len(alike), 'group', 'groups')} of duplicates"
    with atomic_write(path) as file:
        grid(rows, title=f"{count}, a pair of each", groups=range(2, COLUMNS, 2)).save(file, "PNG")
    say_row("Wrote", f"{path}: {count}, a pair of each, the most doubtful first")


def tiles(source: ImageFolder, one: int, other: int, caption: str, frame: tuple[int, int, int]) -> Iterator[Tile]:
    for index, text, colour in ((one, shown(source.name(one))[-16:], None), (other, caption, frame)):
        image = read_image(source, index, most=256)  # if it is gone by now, a grey tile keeps its place
        yield image if isinstance(image, Image.Image) else Image.new("RGB", (8, 8), "grey"), text, colour


def print_rows(rows: Iterator[tuple[str, str]]) -> None:
    for title, text in rows:
        say_row(title, text)


def say_row(title: str, text: str) -> None:
    say(f"{title:<11} {text}")
