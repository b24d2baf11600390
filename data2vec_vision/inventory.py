"""What a scan found: which images to keep, what settings they suggest, a table for people and JSON for programs."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data2vec_vision.run import BAD_SHARE, command, duration, plural, size
from data2vec_vision.sources import ImageFolder
from data2vec_vision.survey import Survey
from data2vec_vision.transforms import IMAGENET_MEAN, IMAGENET_STD

CLEAN = "clean.txt"  # the list in examples of commands
EXAMPLES = 3  # of each kind in the table; JSON has all
LONGEST = 60  # characters of a name or a reason in the table

# Bytes that training keeps for one image, one block, one patch and one channel, in fp32: 34 in half precision
# (Korthikanti et al. 2022, section 4.1, without the attention matrix, which is not stored).
ACTIVATIONS = 68


@dataclass
class Findings:
    """A scan of the images of `source`. Indices are those of `source`."""

    source: ImageFolder
    inputs: tuple[str, ...]  # the paths that it was opened by
    survey: Survey
    copies: list[np.ndarray]  # groups of images whose files are equal
    alike: list[tuple[int, np.ndarray, np.ndarray]]  # the first of a group, the others, and their differing bits
    seconds: float  # of the clock, to look at all images
    workers: int

    @property
    def blank(self) -> np.ndarray:
        return np.flatnonzero(self.survey.records["blank"])

    @property
    def near_duplicates(self) -> int:
        """How many images look like the first of their group."""
        return sum(len(others) for _, others, _ in self.alike)

    @property
    def exact_copies(self) -> int:
        """How many files equal the first of their group."""
        return sum(len(group) - 1 for group in self.copies)

    @property
    def needs_a_list(self) -> bool:
        """Whether so many images cannot be read that `train` would end on them as they are, and a list would help."""
        return self.source.are_files and len(self.survey.bad) > BAD_SHARE * len(self.source)

    @property
    def sides(self) -> tuple[np.ndarray, np.ndarray]:
        """Width and height of the readable images."""
        records = self.survey.records[self.survey.readable]
        return records["width"].astype(np.int64), records["height"].astype(np.int64)

    @property
    def short_side(self) -> int:
        return int(np.median(np.minimum(*self.sides)))

    def kept(self, keep_duplicates: bool = False, drop_alike: bool = False) -> np.ndarray:
        """The indices of a clean list: what can be read, of equal files the first, of images alike all or the first."""
        keep = self.survey.records["width"] > 0
        if not keep_duplicates:
            for group in self.copies:
                keep[group[1:]] = False
        if drop_alike:
            for _, others, _ in self.alike:
                keep[others] = False
        return np.flatnonzero(keep)


def suggest(short_side: int, n_images: int, device: str, memory: int) -> tuple[dict[str, int], dict[str, str]]:
    """Options of `train` for images of this kind, and the reasons for some.

    short_side: the median, in pixels. device: its kind, "cpu" or an accelerator's. memory: its bytes.
    The image size is the short side or 224, on a CPU 96, whichever is less, in whole patches; small images have
    small patches, so that there are at least 6 x 6 from 24 px on. On a CPU, and for images below 96 px, the model is
    small. The batch is a power of two: at most 256, on a CPU, which gains nothing from more, 64; it leaves 16 steps an
    epoch, and its activations take a quarter of the memory, because teacher, weights and further views want room too;
    but it is at least 16.
    """
    largest, why = (96, "more takes a GPU") if device == "cpu" else (224, "what most encoders take")
    if short_side < largest:
        largest, why = short_side, f"the median short side is {short_side} px"
    patch = next((p for p in (16, 8) if largest >= 6 * p), 4)
    side = max(2 * patch, largest // patch * patch)
    width, depth = (192, 6) if device == "cpu" or side < 96 else (384, 12)
    an_image = ACTIVATIONS * (side // patch) ** 2 * width * depth
    bounds = {
        "on a CPU more gains nothing" if device == "cpu" else "more is seldom needed": 64 if device == "cpu" else 256,
        f"16 steps an epoch of {n_images:,} images": n_images // 16,
        f"a quarter of {size(memory)} of memory": memory // 4 // an_image,
    }
    bound = min(bounds, key=lambda reason: bounds[reason])
    batch = 1 << max(0, bounds[bound].bit_length() - 1)
    if batch < 16:
        batch, bound = 16, f"the least that is of use, for {plural(n_images, 'image', 'images')}"
    options = {"image-size": side, "patch-size": patch, "hidden-dim": width, "n-encoders": depth, "batch-size": batch}
    return options, {"image-size": why, "batch-size": bound}


def train_command(paths: Sequence[str], options: dict[str, int]) -> str:
    return command("train", *paths, *(word for name, value in options.items() for word in (f"--{name}", value)))


def table(found: Findings) -> Iterator[tuple[str, str]]:
    """Titles and lines, the most important first; an empty title goes on with the one before."""
    survey, source = found.survey, found.source
    n, readable = len(source), len(survey.readable)
    yield "Images", f"{n:,} in {', '.join(found.inputs)}, {size(survey.bytes)}"
    if source.skipped:
        kinds = ", ".join(f"{suffix or 'no suffix'} {count:,}" for suffix, count in source.skipped.most_common(5))
        yield "", f"{plural(source.skipped.total(), 'file', 'files')} beside them that are no images: {kinds}"
    yield from problems(found)
    yield from sizes(found)
    yield "Formats", counted(survey.formats)
    yield "Modes", counted(survey.modes)
    for trait, count in survey.traits.most_common():
        yield "", f"{count:,} {trait} ({percent(count / readable)})"
    mean, std = survey.mean_std()
    yield "Mean", f"{numbers(mean)}   ImageNet's: {numbers(IMAGENET_MEAN)}"
    yield "Std", f"{numbers(std)}   ImageNet's: {numbers(IMAGENET_STD)}"
    yield "", "of red, green and blue in [0, 1]; each image weighs the same"
    a_core, cores = speed(found), max(1, found.workers)
    took = duration(found.seconds) if found.seconds >= 10 else f"{found.seconds:.1f} s"
    yield "Speed", f"{readable / found.seconds:,.0f} images/s in this scan, which took {took}"
    most = f"training with {plural(cores, 'core', 'cores')} gets at most {per_second(a_core * cores)}"
    yield "", f"a core reads and decodes {per_second(a_core)} images/s: {most}, less for augmentation"


def problems(found: Findings) -> Iterator[tuple[str, str]]:
    """What a clean list leaves out or a person should look at."""
    bad, n, name = found.survey.bad, len(found.source), lambda index: shown(found.source.name(index))
    yield "Unreadable", f"{len(bad):,} ({percent(len(bad) / n)})" if bad else "none"
    for index in sorted(bad)[:EXAMPLES]:
        yield "", f"{name(index)}: {shown(bad[index])}"
    if len(bad) > EXAMPLES:
        yield "", f"... and {len(bad) - EXAMPLES:,} more; --json FILE lists all"
    count = found.exact_copies
    groups = f" of {plural(len(found.copies), 'file', 'files')}" if found.copies else ""
    yield "Duplicates", f"{plural(count, 'exact copy', 'exact copies')}{groups}" if count else "none"
    for group in found.copies[:EXAMPLES]:
        yield "", " = ".join(map(name, group[:2])) + (f" = {len(group) - 2:,} more" if len(group) > 2 else "")
    count = found.near_duplicates
    groups = f" of {plural(len(found.alike), 'other', 'others')}" if found.alike else ""
    yield "Look alike", f"{plural(count, 'near duplicate', 'near duplicates')}{groups}" if count else "none"
    for first, members, _ in found.alike[:EXAMPLES]:
        more_text = f" ~ {len(members) - 1:,} more" if len(members) > 1 else ""
        yield "", f"{name(first)} ~ {name(members[0])}{more_text}"
    if len(found.blank):
        examples = ", ".join(map(name, found.blank[:2])) + (" ..." if len(found.blank) > 2 else "")
        yield "Blank", f"{plural(len(found.blank), 'image', 'images')} of a single colour: {examples}"


def sizes(found: Findings) -> Iterator[tuple[str, str]]:
    facts = size_facts(found)
    if facts["smallest"] == facts["largest"]:
        yield "Sizes", f"all {pixels(facts['median'])}"
        return
    yield (
        "Sizes",
        (
            f"median {pixels(facts['median'])}, from {pixels(facts['smallest'])} to {pixels(facts['largest'])}; "
            f"most often {pixels(facts['most_frequent'])} ({percent(facts['most_frequent_share'])})"
        ),
    )
    parts = ", ".join(f"{name} {percent(facts[name])}" for name in ("landscape", "portrait", "square"))
    yield "", f"{parts}; short side {found.short_side:,} px in the median"


def size_facts(found: Findings) -> dict[str, Any]:
    """Sizes as [width, height] in pixels, the smallest and largest by area, and shares of shapes in [0, 1]."""
    width, height = found.sides
    area = width * height
    kinds, counts = np.unique(width << 32 | height, return_counts=True)
    frequent = int(kinds[counts.argmax()])
    return {
        "median": [int(np.median(width)), int(np.median(height))],
        "smallest": [int(side[area.argmin()]) for side in (width, height)],
        "largest": [int(side[area.argmax()]) for side in (width, height)],
        "most_frequent": [frequent >> 32, frequent & 0xFFFFFFFF],
        "most_frequent_share": float(counts.max() / len(width)),
        "landscape": float((width > height).mean()),
        "portrait": float((width < height).mean()),
        "square": float((width == height).mean()),
        "median_short_side": found.short_side,
    }


def speed(found: Findings) -> float:
    """Images that one process reads and decodes in a second."""
    return len(found.survey.readable) / max(found.survey.seconds, 1e-9)


def to_json(found: Findings, options: dict[str, int], train: str) -> dict[str, Any]:
    """Everything that was found, with all names, relative to the folder as the source has them."""
    survey, name = found.survey, found.source.name
    mean, std = survey.mean_std()
    return {
        "input": found.inputs[0] if len(found.inputs) == 1 else list(found.inputs),
        "images": len(found.source),
        "readable": len(survey.readable),
        "bytes": survey.bytes,
        "skipped": dict(found.source.skipped.most_common()),
        "unreadable": [{"path": name(index), "reason": survey.bad[index]} for index in sorted(survey.bad)],
        "duplicates": [[name(index) for index in group] for group in found.copies],
        "near_duplicates": [
            {
                "first": name(first),
                "others": [{"path": name(i), "differing_bits": int(bits)} for i, bits in zip(others, bits_of)],
            }
            for first, others, bits_of in found.alike
        ],
        "blank": [name(index) for index in found.blank],
        "sizes": size_facts(found),
        "formats": dict(survey.formats.most_common()),
        "modes": dict(survey.modes.most_common()),
        "traits": dict(survey.traits.most_common()),
        "mean": [round(float(value), 6) for value in mean],
        "std": [round(float(value), 6) for value in std],
        "speed": {
            "seconds": round(found.seconds, 3),
            "workers": found.workers,
            "images_per_second": round(len(survey.readable) / found.seconds, 1),
            "decoded_per_second_and_core": round(speed(found), 1),
        },
        "suggested": options,
        "train": train,
    }


def advice(found: Findings, written: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """What to do next about what was found, but for the outputs, by option, that were `written` already."""
    left_out = (len(found.survey.bad), "unreadable"), (found.exact_copies, "copies")
    if found.near_duplicates and "--picture" not in written:
        yield "To judge", f"{command('scan', *found.inputs, '--picture', 'alike.png')}   # what looks alike"
    if any(count for count, _ in left_out) and "--write-list" not in written and found.source.are_files:
        what = " and ".join(f"{count:,} {word}" for count, word in left_out if count)
        yield "To clean", f"{command('scan', *found.inputs, '--write-list', CLEAN)}   # leaves out {what}"


def shown(name: str) -> str:
    """A name as a terminal can show it: what is not printable is escaped, of a long one both ends are kept."""
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)
    half = (LONGEST - 3) // 2
    return text if len(text) <= LONGEST else f"{text[:half]}...{text[-half:]}"


def counted(counts: Counter[str]) -> str:
    """The kinds with their numbers, or the only kind."""
    if len(counts) == 1:
        return f"all {next(iter(counts))}"
    return ", ".join(f"{kind} {count:,}" for kind, count in counts.most_common())


def percent(part: float) -> str:
    """A share in [0, 1] in per cent, never 0 % of something."""
    if 0 < part < 0.001:
        return "less than 0.1 %"
    return f"{100 * part:.1f} %" if 0 < part < 0.1 else f"{100 * part:.0f} %"


def pixels(sides: list[int]) -> str:
    return f"{sides[0]} x {sides[1]}"


def numbers(values: Any) -> str:
    return " ".join(f"{value:.3f}" for value in values)


def per_second(rate: float) -> str:
    """Two digits are all that a rate is good for."""
    digits = 10 ** max(0, len(str(int(rate))) - 2)
    return f"{int(rate) // digits * digits:,}"
