"""What the index of ten million names takes, in the main process and in workers, and how fast archives open.

    python benchmarks/sources.py --names            # 10 million names: a flat folder, a deep one, a list; memory and time
    python benchmarks/sources.py --workers          # what worker processes add, forked and spawned
    python benchmarks/sources.py --open             # a million images in one tar, in 1,000 tars, in one zip; needs 5 GB of disk
    python benchmarks/sources.py --growth           # does memory grow with the steps of a run on ten million images?

The folders are simulated: os.scandir gives names of files that are not there, in random order, at a tenth of the cost of a real
file system. The list is a real file of ten million lines, of which the first 100 exist. Each row is a process of its own. Memory
is what the process has more than before it opened the source: at its peak, and then. USS is what a worker has for itself alone, PSS
counts what several have by their shares; both are medians over the workers, after each has been asked for 2,000 random images.
"""

import argparse
import contextlib
import io
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from data2vec_vision import folders
from data2vec_vision.data import MicroBatches, Stream
from data2vec_vision.sources import ImageFolder, open_source, read_image

N, MANY = 10_000_000, 1_000_000
KINDS = ("flat", "deep", "sorted", "shuffled")


def memory(field: str, process: int | str = "self", file: str = "status") -> float:
    """MB of a field in /proc, such as VmHWM, the peak, and VmRSS."""
    for line in Path(f"/proc/{process}/{file}").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1000
    raise ValueError(field)


def uss(process: int) -> float:
    return sum(memory(f"Private_{kind}", process, "smaps_rollup") for kind in ("Clean", "Dirty", "Hugetlb"))


class Entry:
    """As os.scandir gives it, of a file or folder that is not there."""

    def __init__(self, here: bytes, name: bytes, folder: bool):
        self.here, self.name, self.folder = here, name, folder

    @property
    def path(self) -> bytes:
        return os.path.join(self.here, self.name)

    def is_dir(self) -> bool:
        return self.folder

    def is_file(self) -> bool:
        return not self.folder


def numbers(count: int) -> Iterator[int]:
    """0 to count - 1 in an order that looks random and takes no memory."""
    return ((n * 7_368_787 + 12_345) % count for n in range(count))


def simulated(kind: str, count: int) -> Any:
    """In place of os.scandir: all files in one folder, or 1,000 in each of count / 1,000 folders two below the first."""

    @contextlib.contextmanager
    def scandir(here: bytes) -> Iterator[Iterator[Entry]]:
        depth = 0 if kind == "flat" else here.rstrip(b"/").count(b"/") - root.count(b"/")
        if kind == "flat":
            yield (Entry(here, b"IMG_%08d_%04x.jpg" % (n, n % 65521), False) for n in numbers(count))
        elif depth == 2:
            yield (Entry(here, b"IMG_%04d.jpg" % n, False) for n in numbers(1000))
        else:
            yield (Entry(here, b"folder_%03d" % n, True) for n in range(round((count / 1000) ** 0.5)))

    root = os.fsencode(os.getcwd())
    inodes = iter(range(10**9))
    os.stat = lambda path, real=os.stat, **named: (  # type: ignore[assignment]
        os.stat_result((0, next(inodes), 1, 0, 0, 0, 0, 0, 0, 0)) if isinstance(path, bytes) else real(path, **named)
    )
    return scandir


def write_list(path: Path, count: int, shuffled: bool) -> None:
    order = list(range(count))
    if shuffled:
        random.Random(0).shuffle(order)
        order[order.index(0)], order[0] = order[0], 0
    with open(path, "w") as file:
        file.writelines(f"photos/{n // 1000:05}/IMG_{n:08}.jpg\n" for n in order)
    Path(path.parent, "photos/00000").mkdir(parents=True)
    for n in range(100):
        Image.new("RGB", (32, 32)).save(path.parent / f"photos/00000/IMG_{n:08}.jpg")


def opened(kind: str, count: int) -> ImageFolder:
    """In the present folder."""
    if kind in ("flat", "deep"):
        folders.os.scandir = simulated(kind, count)
        return open_source(".")
    return open_source("list.txt")


def names_of(kind: str, count: int) -> dict[str, float]:
    before, start = memory("VmRSS"), time.perf_counter()
    source = opened(kind, count)
    seconds = time.perf_counter() - start
    result = {"peak": memory("VmHWM") - before, "then": memory("VmRSS") - before, "seconds": seconds}
    assert len(source) == count
    start = time.perf_counter()
    source.fingerprint()
    name_bytes = int(source._index.ends[-1])
    return {**result, "hash": time.perf_counter() - start, "name": name_bytes / count, "base": before}


class Names(Dataset):
    """Random images; the reason comes back for those that are not there."""

    def __init__(self, source: ImageFolder):
        self.source = source

    def __len__(self) -> int:
        return 10**9

    def __getitem__(self, index: int) -> int:
        image = read_image(self.source, index * 7_368_787 % len(self.source))
        return image.width if isinstance(image, Image.Image) else 0


def workers_of(count: int, workers: int, context: str) -> dict[str, float]:
    source = opened("sorted", count)
    before = memory("VmRSS")
    loader = DataLoader(Names(source), 10, sampler=range(10**6), num_workers=workers, multiprocessing_context=context)
    batches, start = iter(loader), time.perf_counter()
    next(batches)
    first = time.perf_counter() - start
    for _ in range(200 * workers):
        next(batches)
    found = [process.pid for process in batches._workers]
    result = {
        "uss": statistics.median(uss(process) for process in found),
        "pss": statistics.median(memory("Pss", process, "smaps_rollup") for process in found),
        "main": memory("VmRSS") - before,
        "first": first,
    }
    del batches
    return result


def tiny_image() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (2, 2)).save(file, "PNG")
    return file.getvalue()


def write_tar(path: str, names: Iterator[str]) -> None:
    data, info = tiny_image(), tarfile.TarInfo()
    info.size = len(data)
    rest = data + bytes(-len(data) % 512)
    with open(path, "wb") as file:
        for name in names:
            info.name = name
            file.write(info.tobuf(tarfile.USTAR_FORMAT) + rest)
        file.write(bytes(1024))


def make_archives(folder: str, kind: str) -> str:
    """A million images in a folder. Returns the INPUT_PATH."""
    if kind == "one tar":
        write_tar(f"{folder}/a.tar", (f"{n % 1000:03}/{n:07}.png" for n in range(MANY)))
        return "a.tar"
    if kind == "one zip":
        data = tiny_image()
        with zipfile.ZipFile(f"{folder}/a.zip", "w") as archive:
            for n in range(MANY):
                archive.writestr(zipfile.ZipInfo(f"{n % 1000:03}/{n:07}.png"), data)
        return "a.zip"
    os.mkdir(f"{folder}/shards")
    for shard in range(1000):
        write_tar(f"{folder}/shards/{shard:06}.tar", (f"{shard:03}{n:04}.png" for n in range(1000)))
    return "shards/*.tar"


def open_of(path: str) -> dict[str, float]:
    before, start = memory("VmRSS"), time.perf_counter()
    source = open_source(path)
    result = {
        "seconds": time.perf_counter() - start,
        "peak": memory("VmHWM") - before,
        "then": memory("VmRSS") - before,
    }
    assert len(source) == MANY
    start = time.perf_counter()
    for n in range(2000):
        assert not isinstance(read_image(source, n * 7_368_787 % MANY), str)
    return {**result, "read": (time.perf_counter() - start) / 2000 * 1e6}


def growth_of(count: int) -> dict[str, float]:
    """Steps of 256 images over the ends of two epochs: MB before and after each."""
    start = time.perf_counter()
    stream = Stream(count, 0)
    stream.image(0)
    result = {"order": time.perf_counter() - start}
    epoch = count // 256
    marks = {100: "first", epoch - 10: "one", epoch + 10: "two", 2 * epoch - 10: "still two", 2 * epoch + 10: "last"}
    for number, _ in enumerate(MicroBatches(stream, 256, 1, 0, 2 * epoch + 20)):
        if number in marks:
            result[marks[number]] = memory("VmRSS")
    return result


def in_a_process_of_its_own(folder: str, *arguments: object) -> dict[str, float]:
    command = [sys.executable, "-W", "ignore", os.path.abspath(__file__), "--of", *map(str, arguments)]
    environment = {**os.environ, "D2V_CACHE": f"{folder}/cache"}
    run = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(run.stdout.splitlines()[-1])


def table(title: str, columns: str) -> None:
    print(f"\n| {title} | {columns} |\n" + "|---" * (2 + columns.count(" | ")) + "|")


def names() -> None:
    table(f"{N:,} names", "bytes a name | peak, MB | then, MB | seconds | seconds of the fingerprint")
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            if kind in ("sorted", "shuffled"):
                write_list(Path(folder, "list.txt"), N, kind == "shuffled")
            row = in_a_process_of_its_own(folder, "names", kind, N)
        what = kind + (" list" if kind in ("sorted", "shuffled") else " folder")
        numbers_ = (
            f"{row['name']:.0f} | {row['peak']:,.0f} | {row['then']:,.0f} | {row['seconds']:.0f} | {row['hash']:.1f}"
        )
        print(f"| {what} | {numbers_} |", flush=True)


def workers() -> None:
    table(
        "workers", "names | USS of one, MB | PSS of one, MB | more in the main process, MB | seconds to the first batch"
    )
    for count in (1000, N):
        with tempfile.TemporaryDirectory() as folder:
            write_list(Path(folder, "list.txt"), count, False)
            for context in ("fork", "spawn"):
                for many in (1, 4):
                    row = in_a_process_of_its_own(folder, "workers", count, many, context)
                    values = f"{row['uss']:,.0f} | {row['pss']:,.0f} | {row['main']:,.0f} | {row['first']:.1f}"
                    print(f"| {many}, {context} | {count:,} | {values} |", flush=True)


def archives() -> None:
    table(
        f"{MANY:,} images",
        "first opened, s | its peak, MB | opened again, s | then, MB | peak, MB | an image read and decoded, us",
    )
    for kind in ("one tar", "1,000 tars", "one zip"):
        with tempfile.TemporaryDirectory() as folder:
            path = make_archives(folder, kind)
            first, again = (in_a_process_of_its_own(folder, "open", path) for _ in range(2))
        values = f"{first['seconds']:.1f} | {first['peak']:,.0f} | {again['seconds']:.2f} | {again['then']:,.0f}"
        print(f"| {kind} | {values} | {again['peak']:,.0f} | {again['read']:.0f} |", flush=True)


def growth() -> None:
    table(
        f"{N:,} images", "seconds to draw an order | MB at step 100, before and after the end of epoch 1 and of epoch 2"
    )
    row = in_a_process_of_its_own(".", "growth", N)
    values = ", ".join(f"{row[step]:,.0f}" for step in ("first", "one", "two", "still two", "last"))
    print(f"| the stream of steps of 256 images | {row['order']:.2f} | {values} |", flush=True)


def of(job: str, *arguments: str) -> dict[str, float]:
    """What a process of its own does."""
    if job == "names":
        return names_of(arguments[0], int(arguments[1]))
    if job == "workers":
        return workers_of(int(arguments[0]), int(arguments[1]), arguments[2])
    return open_of(*arguments) if job == "open" else growth_of(int(arguments[0]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    jobs = {"names": names, "workers": workers, "open": archives, "growth": growth}
    for name in jobs:
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--of", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.of:
        print(json.dumps(of(*args.of)))
        return
    print(f"{platform.platform()}, Python {platform.python_version()}, torch {torch.__version__}")
    for name, job in jobs.items():
        if getattr(args, name):
            job()


if __name__ == "__main__":
    main()
