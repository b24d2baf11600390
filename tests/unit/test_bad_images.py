"""Every kind of image file that people have, whole, odd, damaged or hostile, and what becomes of each: one table.

A kind is read, and then its pixels are those that arithmetic gives, or it is unreadable, with a reason. Nothing ends a
run, hangs, or takes memory that a picture of some pixels cannot need: address space is bounded in these tests.
"""

import base64
import contextlib
import io
import os
import re
import socket
import struct
import tarfile
import zipfile
import zlib
from dataclasses import dataclass

import numpy as np
import pytest
from PIL import Image, ImageCms

from data2vec_vision.__main__ import main
from data2vec_vision.errors import InputError, Unreadable
from data2vec_vision.folders import ImageFolder
from data2vec_vision.images import Picture
from data2vec_vision.sources import open_source, read_image

ROOM = 2 * 2**30  # bytes of address space: a bomb below has 2.7 GB of pixels
H, W = 4, 6
Y, X = np.mgrid[:H, :W]
RGB = np.stack([40 * X, 60 * Y, 10 * (X + Y)], axis=2).astype(np.uint8)  # [H, W, 3]
GREY = (40 * X + 5 * Y).astype(np.uint8)
FLAT = np.full((8, 8, 3), (200, 100, 50), np.uint8)  # survives any JPEG
BW = np.where((X + Y) % 2 == 1, 255, 0).astype(np.uint8)


def three(grey):
    return np.repeat(np.asarray(grey)[:, :, None], 3, axis=2)


def over_white(pixels, alpha):
    share = np.asarray(alpha, np.float64)[:, :, None] / 255
    return pixels * share + 255 * (1 - share)


@dataclass
class Kind:
    """A file, and what becomes of it: `pixels` [h, w, 3] within `tolerance`, or else a `reason`."""

    name: str
    data: bytes
    pixels: np.ndarray | None = None
    tolerance: float = 0
    reason: str = ""


def saved(image, format, **options):
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, format, **options)
    return file.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, depth, colour, rows, *more):
    """A PNG by hand; `more` are chunks before the pixels."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [chunk(b"IHDR", header), *more, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def bmp(bits, rows, height=H, compression=0, palette=b"", width=W):
    """A BMP by hand: rows as they lie in the file."""
    start = 54 + len(palette)
    size = struct.pack("<2sIHHI", b"BM", start + len(rows), 0, 0, start)
    about = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, len(rows), 0, 0, len(palette) // 4, 0)
    return size + about + palette + rows


def padded(rows):
    """Rows of bytes, each to a multiple of four."""
    return b"".join(row + bytes(-len(row) % 4) for row in rows)


def exif(turn, more=0):
    found = Image.Exif()
    found[0x0112] = turn
    if more:
        found[0x010E] = "x" * more
    return found.tobytes()


def upright(pixels, turn):
    """EXIF 2.32, tag 274: which side of the scene row 0 and column 0 of the stored image are."""
    flips = {1: (), 2: (1,), 3: (0, 1), 4: (0,), 5: (), 6: (0,), 7: (0, 1), 8: (1,)}[turn]
    stored = np.flip(pixels, flips) if flips else pixels
    return stored.swapaxes(0, 1) if turn > 4 else stored


def rle8(rows):
    return b"".join(b"".join(bytes([1, v]) for v in row) + b"\0\0" for row in rows) + b"\0\1"


def palette_png(transparent):
    image = Image.fromarray((X % 3).astype(np.uint8))
    image = image.convert("P")
    image.putdata([int(v) for v in (X % 3).ravel()])
    image.putpalette([250, 10, 20, 30, 240, 50, 60, 70, 230])
    return saved(image, "PNG", **({"transparency": bytes([255, 0, 128])} if transparent else {}))


COLOURS = np.array([[250, 10, 20], [30, 240, 50], [60, 70, 230]])[X % 3]
ALPHA = np.array([255, 0, 128])[X % 3]
SEVERAL = [Image.fromarray(np.roll(RGB, n, axis=1)) for n in range(3)]
# By `jpegtran -arithmetic` of libjpeg-turbo, and by imagecodecs: what Pillow does not write.
ARITHMETIC = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAIBAQEBAQIBAQECAgICAgQDAgICAgUEBAMEBgUGBgYFBgYGBwkIBgcJBwYGCAsICQoKCgoKBggLDAsK"
    "DAkKCgr/2wBDAQICAgICAgUDAwUKBwYHCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgr/yQARCAAIAAgD"
    "ASIAAhEBAxEB/8wACgAQEAUBEBEF/9oADAMBAAIRAxEAPwD+Lusus28g/9k="
)
YCCK = base64.b64decode(
    "/9j/7gAOQWRvYmUAZAAAAAAC/9sAQwACAQEBAQECAQEBAgICAgIEAwICAgIFBAQDBAYFBgYGBQYGBgcJCAYHCQcGBggLCAkKCgoKCgYICwwLCgwJ"
    "CgoK/9sAQwECAgICAgIFAwMFCgcGBwoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoK/8AAFAgACAAIBAEi"
    "AAIRAQMRAQQiAP/EABUAAQEAAAAAAAAAAAAAAAAAAAAJ/8QAFBABAAAAAAAAAAAAAAAAAAAAAP/EABUBAQEAAAAAAAAAAAAAAAAAAAcI/8QAFBEB"
    "AAAAAAAAAAAAAAAAAAAAAP/aAA4EAQACEQMRBAAAPwCZ4CmAOsIA/9k="
)
CMYK = np.full((8, 8, 4), (10, 60, 120, 30), np.uint8)
OF_CMYK = np.full((8, 8, 3), [(255 - v) * (255 - 30) / 255 for v in (10, 60, 120)])
PHOTO = np.asarray(
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((64, 48))
)
SHAPES = {
    "cut.png": "PNG",
    "cut.jpg": "JPEG",
    "cut.bmp": "BMP",
    "cut.gif": "GIF",
    "cut.tif": "TIFF",
    "cut.webp": "WEBP",
}
SCREEN = b"".join(b"\0" + row.tobytes() for row in RGB)
SIXTEEN = (np.stack([40 * X, 60 * Y, 10 * (X + Y)], axis=2) * 256 + 77).astype(">u2")
LONGEST = "n" * 251 + ".png"
EMOJI = "\N{PILE OF POO}\N{ZERO WIDTH JOINER}\u202e.png"

READ = [
    Kind("rgb.png", saved(RGB, "PNG"), RGB),
    Kind("one bit.png", saved(Image.fromarray(BW).convert("1"), "PNG"), three(BW)),
    Kind("palette.png", palette_png(False), COLOURS),
    Kind("palette with transparency.png", palette_png(True), over_white(COLOURS, ALPHA), 1),
    Kind("grey.png", saved(GREY, "PNG"), three(GREY)),
    Kind("grey and alpha.png", saved(np.stack([GREY, ALPHA.astype(np.uint8)], axis=2), "PNG"), over_white(three(GREY), ALPHA), 1),
    Kind("colour and alpha.png", saved(np.dstack([RGB, ALPHA.astype(np.uint8)]), "PNG"), over_white(RGB, ALPHA), 1),
    Kind("grey of 16 bits.png", saved(GREY.astype(np.uint16) * 256 + 77, "PNG"), three(GREY)),
    Kind("colour of 16 bits.png", png(W, H, 16, 2, b"".join(b"\0" + row.tobytes() for row in SIXTEEN)), RGB),
    Kind("grey of 16 bits.tif", saved(GREY.astype(np.uint16) * 256 + 77, "TIFF"), three(GREY)),
    Kind("floats.tif", saved(Image.fromarray(X.astype(np.float32)), "TIFF"), three(X * 255 / (W - 1)), 1),
    Kind("cmyk.tif", saved(Image.fromarray(CMYK, "CMYK"), "TIFF"), OF_CMYK, 1),
    Kind("cmyk.jpg", saved(Image.fromarray(CMYK, "CMYK"), "JPEG", quality=95), OF_CMYK, 3),
    Kind("ycck.jpg", YCCK, OF_CMYK, 3),
    Kind("progressive.jpg", saved(FLAT, "JPEG", progressive=True, quality=95), FLAT, 2),
    Kind("arithmetic.jpg", ARITHMETIC, FLAT, 2),
    Kind("grey.jpg", saved(FLAT[:, :, 0], "JPEG", quality=95), three(FLAT[:, :, 0]), 2),
    Kind("animated.gif", saved(Image.fromarray(GREY), "GIF", save_all=True, append_images=[Image.fromarray(255 - GREY)]), three(GREY)),
    Kind("animated.webp", saved(SEVERAL[0], "WEBP", save_all=True, append_images=SEVERAL[1:], lossless=True), RGB),
    Kind("animated.png", saved(SEVERAL[0], "PNG", save_all=True, append_images=SEVERAL[1:]), RGB),
    Kind("pages.tif", saved(SEVERAL[0], "TIFF", save_all=True, append_images=SEVERAL[1:]), RGB),
    *(Kind(f"exif {n}.png", saved(RGB, "PNG", exif=exif(n)), upright(RGB, n)) for n in range(1, 9)),
    *(Kind(f"exif {n}.tif", saved(RGB, "TIFF", exif=exif(n)), upright(RGB, n)) for n in (3, 6)),
    Kind("exif 9, which is none.png", saved(RGB, "PNG", exif=exif(9)), RGB),
    Kind("exif of 65,000 bytes.jpg", saved(FLAT, "JPEG", quality=95, exif=exif(1, 65_000)), FLAT, 2),
    Kind("exif of 8 MB.png", saved(RGB, "PNG", exif=exif(3, 2**23)), upright(RGB, 3)),
    Kind("exif that is noise.jpg", saved(FLAT, "JPEG", quality=95, exif=b"Exif\0\0" + b"\xff\x13" * 99), FLAT, 2),
    Kind("profile.png", saved(RGB, "PNG", icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()), RGB),
    Kind("broken profile.png", saved(RGB, "PNG", icc_profile=b"\0" * 7), RGB),
    Kind("broken profile.jpg", saved(FLAT, "JPEG", quality=95, icc_profile=b"no profile" * 9000), FLAT, 2),
    Kind("one pixel.png", saved(RGB[2:3, 3:4], "PNG"), RGB[2:3, 3:4]),
    Kind("1 x 10000.png", saved(np.zeros((10_000, 1, 3), np.uint8) + 7, "PNG"), np.full((10_000, 1, 3), 7)),
    Kind("10000 x 1.jpg", saved(np.zeros((1, 10_000, 3), np.uint8) + 128, "JPEG"), np.full((1, 10_000, 3), 128), 2),
    Kind("24 bits.bmp", saved(RGB, "BMP"), RGB),
    Kind("from the top.bmp", bmp(24, padded(row[:, ::-1].tobytes() for row in RGB), -H), RGB),
    Kind("32 bits.bmp", bmp(32, np.dstack([RGB[::-1, :, ::-1], np.zeros((H, W), np.uint8)]).tobytes()), RGB),
    Kind("15 bits.bmp", bmp(16, padded(row.tobytes() for row in ((X << 10) + (Y << 5) + X)[::-1].astype("<u2"))), np.stack([X, Y, X], axis=2) * 255 / 31, 1),
    Kind("palette.bmp", saved(GREY, "BMP"), three(GREY)),
    Kind("one bit.bmp", saved(Image.fromarray(BW).convert("1"), "BMP"), three(BW)),
    Kind("runs.bmp", bmp(8, rle8(GREY[::-1].tolist()), H, 1, b"".join(bytes([n, n, n, 0]) for n in range(256))), three(GREY)),
    Kind("of another name.jpg", saved(RGB, "PNG"), RGB),
    Kind("of another name.png", saved(FLAT, "JPEG", quality=95), FLAT, 2),
    Kind("of another name.bmp", saved(Image.fromarray(GREY), "GIF"), three(GREY)),
    Kind("plain.ppm", b"P3 6 4 255\n" + " ".join(map(str, RGB.ravel())).encode(), RGB),
    Kind("something behind.png", saved(RGB, "PNG") + b"<script>" * 1000, RGB),
    Kind("a line\nbreak.png", saved(RGB, "PNG"), RGB),
    Kind("a return\r.png", saved(RGB, "PNG"), RGB),
    Kind("a\ttab.png", saved(RGB, "PNG"), RGB),
    Kind(os.fsdecode(b"no unicode \xff\xfe.png"), saved(RGB, "PNG"), RGB),
    Kind("--help.png", saved(RGB, "PNG"), RGB),
    Kind(EMOJI, saved(RGB, "PNG"), RGB),
    Kind(LONGEST, saved(RGB, "PNG"), RGB),
    Kind("quotes '\" and $(exit) `exit`.png", saved(RGB, "PNG"), RGB),
    Kind("<script>alert(1)<|script>.png", saved(RGB, "PNG"), RGB),
    Kind("SHOUTED.PNG", saved(RGB, "PNG"), RGB),
]  # fmt: skip
BOMB = png(30_000, 30_000, 8, 2, bytes(1000))
BAD = [
    Kind("nothing.png", b"", reason="it is empty"),
    Kind("nothing.jpg", b"", reason="it is empty"),
    Kind("text.jpg", b"this is no image", reason="of no format that Pillow reads"),
    Kind("page.jpg", b"<!DOCTYPE html><html><body>404</body></html>", reason="of no format that Pillow reads"),
    Kind("drawing.png", b'<svg xmlns="http://www.w3.org/2000/svg"/>', reason="of no format that Pillow reads"),
    Kind("document.jpg", b"%PDF-1.4\n%\xe2\xe3\xcf\xd3\n", reason="of no format that Pillow reads"),
    Kind("program.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(exploded) (w) file\n%%EOF\n", reason="of no format that Pillow reads"),
    Kind("zeros.jpg", bytes(5000), reason="of no format that Pillow reads"),
    Kind("only how it begins.jpg", b"\xff\xd8\xff\xe0", reason="begins as a JPEG and is none"),
    *(Kind(f"{share} of 9 {name}", (whole := saved(PHOTO, format))[: len(whole) * share // 9], reason=".") for name, format in SHAPES.items() for share in (1, 5, 8)),
    Kind("30000 x 30000.png", BOMB, reason="exceeds limit"),
    Kind("2000000000 x 1.png", png(2_000_000_000, 1, 8, 2, b""), reason="too many|decompression bomb"),
    Kind("65535 x 65535.gif", b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b";", reason="."),
    Kind("30000 x 30000.bmp", bmp(24, b"", 30_000, width=30_000), reason="exceeds limit"),
    Kind("0 x 0.png", png(0, 0, 8, 2, b""), reason="."),
    Kind("-1 high.bmp", bmp(24, b"", -1, width=-(2**31)), reason="."),
    Kind("text that is inflated.png", png(W, H, 8, 2, SCREEN, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**28)))), reason="[Tt]oo large"),
    Kind("pixels that are inflated.png", png(W, H, 8, 2, bytes(2**27)), np.zeros((H, W, 3))),
    Kind("of a wrong sum.png", saved(RGB, "PNG").replace(b"IDAT", b"IDAX"), reason="."),
    Kind("a directory without end.tif", b"II*\0\x08\0\0\0" + b"\x01\0" + b"\0" * 12 + b"\x08\0\0\0", reason="."),
    Kind("very many tags.tif", b"II*\0\x08\0\0\0\xff\xff" + b"\0\x01\x04\0\xff\xff\xff\xff\xff\xff\xff\x7f" * 10, reason="."),
]  # fmt: skip
KINDS = READ + BAD
# What training can take crops of, with room for a strip, and nothing can read whole.
LARGE = [
    Kind(
        "30000 x 30000.tif",
        saved(Image.new("1", (30_000, 30_000)), "TIFF", compression="group4"),
        reason="exceeds limit|one piece|allocate",
    ),
]


def check(kind, image):
    """That an image, or the reason why there is none, is what the table says."""
    if kind.pixels is None:
        assert isinstance(image, str) and re.search(kind.reason, image), image
        assert "\n" not in image and len(image) < 400
        return
    assert isinstance(image, Image.Image), image
    pixels = np.asarray(image, np.float64)
    assert pixels.shape == kind.pixels.shape
    assert np.abs(pixels - kind.pixels).max() <= kind.tolerance


def test_there_are_many_kinds():
    assert len({kind.name for kind in KINDS}) == len(KINDS) > 80


@pytest.mark.parametrize("kind", KINDS + LARGE, ids=lambda kind: ascii(kind.name)[:60])
def test_each_is_read_right_or_said(kind, bounded_memory):
    for way in ("image", "pixels", "crops"):
        try:
            picture = Picture.of(io.BytesIO(kind.data))
            if way == "image":
                found = picture.image()
            elif way == "pixels" and isinstance(picture, Picture):
                found = Image.fromarray(picture.pixels().permute(1, 2, 0).numpy())
            else:
                picture.crops([(0, 0, min(picture.size[1], 4), min(picture.size[0], 4))], [(4, 4)])
                continue
        except Unreadable as error:
            found = str(error)
        check(kind, found)


def write_folder(root):
    """All kinds as files, and what only a file system has. Returns {name: kind} of what counts as an image."""
    root.mkdir()
    for kind in KINDS:
        (root / kind.name).write_bytes(kind.data)
    there = {kind.name: kind for kind in KINDS}
    (root / "dangling.png").symlink_to("nowhere.png")
    (root / "itself.png").symlink_to("itself.png")
    (root / "linked.png").symlink_to("rgb.png")
    (root / "error.png").symlink_to("/proc/self/mem")  # a file whose reading fails, whoever reads
    there |= {
        "dangling.png": Kind("dangling.png", b"", reason="no such file, or a link to one"),
        "itself.png": Kind("itself.png", b"", reason="symbolic links"),
        "linked.png": Kind("linked.png", b"", RGB),
        "error.png": Kind("error.png", b"", reason="Input/output error"),
    }
    if os.geteuid():  # who is root may read everything
        (root / "forbidden.png").write_bytes(b"")
        (root / "forbidden.png").chmod(0)
        there["forbidden.png"] = Kind("forbidden.png", b"", reason="Permission denied")
    (root / "folder.jpg").mkdir()
    (root / "folder.jpg" / "in it.png").write_bytes(saved(RGB, "PNG"))
    there["folder.jpg/in it.png"] = Kind("in it.png", b"", RGB)
    (root / "folder.jpg" / "around").symlink_to(root)
    os.mkfifo(root / "pipe.png")
    (root / "zeros.png").symlink_to("/dev/zero")
    (root / "terminal.png").symlink_to("/dev/tty")
    here = os.getcwd()
    os.chdir(root)  # the path of a socket is short
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket.png")
    os.chdir(here)
    (root / ".hidden.png").write_bytes(b"")
    (root / ".DS_Store").write_bytes(b"")
    (root / "__MACOSX").mkdir()
    (root / "__MACOSX" / "._rgb.png").write_bytes(b"")
    (root / "Thumbs.db").write_bytes(b"")
    return there


def check_source(source, there):
    assert sorted(source.name(n) for n in range(len(source))) == sorted(there)
    for n in range(len(source)):
        check(there[source.name(n)], read_image(source, n))


def test_a_folder_of_all_kinds(tmp_path, bounded_memory):
    there = write_folder(tmp_path / "all")
    check_source(ImageFolder(tmp_path / "all"), there)
    (tmp_path / "list.txt").write_bytes(b"\n".join(os.fsencode(n) for n in there if not {"\n", "\r"} & {*n}))
    (tmp_path / "list.txt").rename(tmp_path / "all" / "list.txt")
    with open(tmp_path / "all" / "list.txt", "ab") as file:
        file.write(b"\npipe.png\nzeros.png\n.")
    listed = open_source(tmp_path / "all" / "list.txt")
    extra = {n: Kind(n, b"", reason="a folder or a device") for n in ("pipe.png", "zeros.png", ".")}
    check_source(listed, {n: kind for n, kind in there.items() if not {"\n", "\r"} & {*n}} | extra)


@pytest.mark.parametrize("suffix", [".zip", ".tar"])
def test_the_same_kinds_in_an_archive(tmp_path, bounded_memory, suffix):
    path = tmp_path / f"all{suffix}"
    hidden = {
        "__MACOSX/._rgb.png": b"",
        "__MACOSX/rgb.png": b"x",
        ".DS_Store": b"",
        ".hidden.png": b"",
        "a/.b/c.png": b"",
    }
    there = {kind.name: kind for kind in KINDS}
    if suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in {**hidden, **{kind.name: kind.data for kind in KINDS}}.items():
                if name.isprintable() or name == EMOJI:
                    archive.writestr(name, data)
        there = {name: kind for name, kind in there.items() if name.isprintable() or name == EMOJI}
    else:
        there |= {n: Kind(n, b"", RGB) for n in ("../../outside.png", "linked.png")} | {
            "absolute.png": Kind("", b"", RGB)
        }
        with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
            named = {**hidden, "rgb.png": b"an earlier one", **{kind.name: kind.data for kind in KINDS}}
            named |= {"../../outside.png": saved(RGB, "PNG"), "/absolute.png": saved(RGB, "PNG")}
            for name, data in (("rgb.png", b"an earlier member of that name"), *named.items()):
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
            for name, kind, target in (
                ("linked.png", tarfile.LNKTYPE, "rgb.png"),
                ("outside.png", tarfile.SYMTYPE, "/etc/passwd"),
                ("device.png", tarfile.CHRTYPE, ""),
                ("pipe.png", tarfile.FIFOTYPE, ""),
            ):
                entry = tarfile.TarInfo(name)
                entry.type, entry.linkname = kind, target
                archive.addfile(entry)
    check_source(open_source(path), there)
    assert sorted(os.listdir(tmp_path)) == [".cache", path.name]


def zip_of(files):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files:
            archive.writestr(name, data)
    return bytearray(file.getvalue())


def tar_of(files):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, data in files:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return bytearray(file.getvalue())


def patched(data, mark, offset, form, *values):
    """With the field at `offset` behind each `mark` replaced."""
    at = data.find(mark)
    while at >= 0:
        struct.pack_into(form, data, at + offset, *values)
        at = data.find(mark, at + 4)
    return data


FILES = [("a.png", saved(RGB, "PNG")), ("b.png", saved(255 - RGB, "PNG"))]
CENTRAL, END = b"PK\x01\x02", b"PK\x05\x06"
LARGE_TAR = tar_of(FILES)
LARGE_TAR[124:136] = b"\x80" + bytes(3) + struct.pack(">Q", 2**62)
LARGE_TAR[148:156] = b"%06o\0 " % (sum(LARGE_TAR[:148]) + 8 * 32 + sum(LARGE_TAR[156:512]))
ARCHIVES = {  # name: the bytes, and the reason of the archive or of its images
    **{f"cut at {n}.zip": (zip_of(FILES)[: n * 40], "is no .zip archive") for n in range(8)},
    **{f"cut at {n}.tar": (tar_of(FILES)[: 100 + n * 300], "is no .tar archive") for n in range(7)},
    "encrypted.zip": (patched(zip_of(FILES), CENTRAL, 8, "<H", 1), "it is encrypted"),
    "says that it becomes 4 GB.zip": (patched(zip_of(FILES), CENTRAL, 24, "<I", 2**32 - 2), "too many for an image"),
    "says that it is shorter.zip": (patched(zip_of(FILES), CENTRAL, 24, "<I", 9), "checksum differs"),
    "has other members.zip": (patched(zip_of(FILES), CENTRAL, 42, "<I", 2**31), "header is not where|is no .zip"),
    "has 65535 members.zip": (patched(zip_of(FILES), END, 8, "<HH", 65535, 65535), None),
    "has a directory of 4 GB.zip": (patched(zip_of(FILES), END, 12, "<I", 2**32 - 2), "is no .zip archive"),
    "becomes 300 MB.zip": (zip_of([("a.png", bytes(300 * 2**20))]), "of no format"),
    "becomes 600 MB.zip": (zip_of([("a.png", bytes(600 * 2**20))]), "too many for an image"),
    "has a member of 4 EB.tar": (LARGE_TAR, "is no .tar archive|ends before it does|cannot be read"),
    "twice the same.zip": (zip_of([("a.png", b"x"), FILES[0]]), None),
    "outside.zip": (zip_of([("../../a.png", FILES[0][1]), ("/b.png", FILES[0][1])]), None),
    "zeros.tar": (bytearray(10240), "no images"),
    "zeros.zip": (bytearray(10240), "is no .zip archive"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", ARCHIVES)
def test_bad_archives(tmp_path, bounded_memory, name):
    data, reason = ARCHIVES[name]
    (tmp_path / name).write_bytes(data)
    try:
        source = open_source(tmp_path / name)
    except InputError as error:
        assert reason and re.search(reason, str(error)) and "\n" not in str(error)
        return
    for n in range(len(source)):
        found = read_image(source, n)
        if reason is None:
            assert (np.asarray(found) == RGB).all() or (np.asarray(found) == 255 - RGB).all()
        else:
            assert isinstance(found, str) and re.search(reason, found), found
    assert set(os.listdir(tmp_path)) == {".cache", name}


TINY = ["--image-size", "8", "--patch-size", "4", "--hidden-dim", "16", "--n-heads", "2", "--n-encoders", "1",
        "--batch-size", "32", "--epochs", "1", "--workers", "0", "--precision", "fp32", "--device", "cpu",
        "--no-report", "--no-tensorboard"]  # fmt: skip


def escaped(name):
    return name.translate({9: "\\t", 10: "\\n", 13: "\\r"})


def test_a_run_over_all_kinds_lists_the_bad_ones_and_extract_has_the_others(tmp_path, capfd, bounded_memory):
    there = write_folder(tmp_path / "all")
    bad = sorted(name for name, kind in there.items() if kind.pixels is None)
    (tmp_path / "all" / "more").mkdir()
    for n in range(10 * len(bad)):  # a run fails when more than a tenth is bad
        os.link(tmp_path / "all" / "rgb.png", tmp_path / "all" / "more" / f"{n}.png")
    assert main(["train", "all", *TINY, "--checkpoint-out-dir", "run"]) == 0, capfd.readouterr().err
    lines = (tmp_path / "run" / "bad_files.txt").read_bytes().decode("utf-8", "surrogateescape").split("\n")[:-1]
    listed = dict(line.split("\t", 1) for line in lines)
    assert len(lines) == len(bad) and sorted(listed) == sorted(map(escaped, bad))
    for name in bad:
        check(there[name], listed[escaped(name)])
    assert main(["extract", "run/student_0.pt", "all", "--output", "features.npz", "--workers", "0"]) == 0
    said = " ".join(capfd.readouterr())
    assert f"{len(bad):,} images" in said or f"{len(bad)} " in said
    paths = {str(path) for path in np.load("features.npz")["paths"]}
    good = {name for name, kind in there.items() if kind.pixels is not None}
    assert {path for path in paths if not path.startswith("more/")} == good
    assert np.isfinite(np.load("features.npz")["features"]).all()


def test_files_that_go_or_shrink_while_they_are_used(tmp_path):
    """Between the index and the reading, and between the header and the pixels."""
    (tmp_path / "all").mkdir()
    rng = np.random.default_rng(0)
    for n, suffix in enumerate(("png", "jpg", "tif", "npy", "bmp")):
        pixels = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        if suffix == "npy":
            np.save(tmp_path / "all" / f"{n}.npy", pixels)
        else:
            Image.fromarray(pixels).save(tmp_path / "all" / f"{n}.{suffix}")
    source = ImageFolder(tmp_path / "all")
    for n in range(len(source)):
        path = source.path(n)
        before = np.asarray(read_image(source, n))
        with open(path, "rb") as file:
            picture = Picture.of(file)
            os.truncate(path, 200)
            with contextlib.suppress(Unreadable):  # all of some formats is read at once
                assert (np.asarray(picture.image()) == before).all()
        assert isinstance(read_image(source, n), str)
        os.unlink(path)
        assert read_image(source, n) == "no such file, or a link to one"


def test_places_that_lie_in_a_table(tmp_path):
    """The ends of the values in a column, replaced by others: what they point at is not there."""
    pyarrow = pytest.importorskip("pyarrow")
    column = pyarrow.array([b"a" * 1000, b"b" * 500], pyarrow.binary())
    rows = pyarrow.table({"image": column})
    with pyarrow.ipc.new_stream(str(tmp_path / "t.arrow"), rows.schema) as stream:
        stream.write_table(rows)
    data = (tmp_path / "t.arrow").read_bytes()
    ends = struct.pack("<iii", 0, 1000, 1500)
    assert data.count(ends) == 1
    for lie in ((0, 1000, 2**30), (0, -1000, 1500), (1500, 1000, 0)):
        (tmp_path / "t.arrow").write_bytes(data.replace(ends, struct.pack("<iii", *lie)))
        with pytest.raises(InputError, match="no table that can be read"):
            open_source(tmp_path / "t.arrow")


def test_an_error_is_one_line_whatever_a_name_holds(tmp_path):
    (tmp_path / "l.csv").write_bytes(b'path\n"a\nb\r\x1b[2J.png"\n')
    with pytest.raises(InputError, match=r"a\\nb\\r\\x1b\[2J.png") as caught:
        open_source(tmp_path / "l.csv")
    assert str(caught.value).isprintable()
