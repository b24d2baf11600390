"""Archives read in place are folders in another form: the same names, order and bytes; damage is told in one line."""

import io
import json
import multiprocessing
import os
import pickle
import random
import stat
import struct
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from data2vec_vision import archives, cache, index
from data2vec_vision.errors import InputError
from data2vec_vision.index import MEMBER, Index, in_order
from data2vec_vision.sources import ImageFolder, open_source, read_image

ALPHABET = "ab-.~ Zü日0"
PART = st.text(ALPHABET, min_size=1, max_size=4).filter(lambda part: not part.startswith("."))
LEAF = st.builds(str.__add__, PART, st.sampled_from([".png", ".JPG", ".txt", ""]))
NAMES = st.lists(
    st.builds(lambda folders, leaf: "/".join([*folders, leaf]), st.lists(PART, max_size=3), LEAF), unique=True
)


def png(number=0, side=4):
    pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def names(source):
    return [source.name(i) for i in range(len(source))]


def content(source):
    found = {}
    for i in range(len(source)):
        with source.open(i) as file:
            found[source.name(i)] = file.read()
    return found


def make_zip(path, files, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return str(path)


def make_tar(path, files, form=tarfile.PAX_FORMAT):
    with tarfile.open(path, "w", format=form) as archive:
        for name, data in files.items():
            add(archive, name, data)
    return str(path)


def add(archive, name, data=b"", **fields):
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    for field, value in fields.items():
        setattr(entry, field, value)
    archive.addfile(entry, io.BytesIO(data))


def reason(source, at=0):
    found = read_image(source, at)
    assert isinstance(found, str) and "\n" not in found, found
    return found


FILES = {f"{label}/{n}.png": png(n) for n, label in enumerate(["cat", "dog", "cat", "a b", "ü"])}


@pytest.fixture
def both(tmp_path):
    """The same images in a zip and in a tar."""
    return make_zip(tmp_path / "p.zip", FILES), make_tar(tmp_path / "p.tar", FILES)


@settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(NAMES, st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]), st.randoms(use_true_random=False))
def test_a_folder_a_zip_and_a_tar_of_it_are_one(tmp_path_factory, found, form, shuffled):
    place = tmp_path_factory.mktemp("tree")
    (place / "tree").mkdir()
    files = {}
    for number, name in enumerate(found):
        path = place / "tree" / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(str(number).encode() * number)
        except OSError:  # a file has the name of a folder
            continue
        files[f"./{name}" if number % 2 else name] = path.read_bytes()
    files = dict(sorted(files.items(), key=lambda pair: shuffled.random()))
    sources = [make_zip(place / "p.zip", files), make_tar(place / "p.tar", files, form), place / "tree"]
    try:
        folder = open_source(sources.pop())
    except InputError as error:
        assert "no images in" in str(error)
        for path in sources:
            with pytest.raises(InputError, match="no images in"):
                open_source(path)
        return
    assert names(folder) == sorted(names(folder), key=os.fsencode)
    for path in sources:
        source = open_source(path)
        assert list(content(source).items()) == list(content(folder).items())
        assert source.skipped == folder.skipped and source.fingerprint() == folder.fingerprint()
        assert names(open_source(path)) == names(folder)  # now from the cache


@settings(deadline=None, derandomize=True, database=None)
@given(st.lists(st.binary(max_size=5)), st.integers(1, 7))
def test_names_sorted_by_parts_are_sorted(found, run):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "RUN", run)
        patch.setattr(index, "BLOCK", 3)
        ordered = sorted(found)
        assert list(in_order(found)) == ordered
        made = Index.of(ordered)
        assert list(made) == [made[i] for i in range(len(made))] == ordered
        joined = Index.joined([made, Index.of([]), made])
        assert list(joined) == ordered * 2 and len(joined) == 2 * len(ordered)


@pytest.mark.parametrize("mapped", [0, 10**9])
def test_an_index_in_a_file_is_the_index(tmp_path, monkeypatch, mapped):
    monkeypatch.setattr(index, "MAPPED", mapped)
    members = np.array([(1, 2, 3, 4, 5), (2**40, 7, 8, 2**32 - 1, 1)], MEMBER)
    made = Index.of([b"a", b"\xffbc"], members)
    path = str(tmp_path / "x.index")
    with open(path, "wb") as file:
        made.write(file, {"more": "ü"})
    again, about = Index.read(path)
    assert list(again) == list(made) and again.hash() == made.hash() and about["more"] == "ü"
    assert again.members.tolist() == members.tolist() and again.ends.dtype == np.int64
    whole = Path(path).read_bytes()
    for damaged in (
        [whole[:n] for n in range(0, len(whole), 7)]
        + [whole + b"x"]
        + [whole[:n] + bytes([whole[n] ^ 1]) + whole[n + 1 :] for n in range(whole.index(b"\n") + 1, len(whole))]
    ):
        Path(path).write_bytes(damaged)
        with pytest.raises(ValueError):
            Index.read(path)


def test_images_are_those_of_the_folder(tmp_path, both):
    for name, data in FILES.items():
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_bytes(data)
    folder = ImageFolder(tmp_path / "tree")
    for path in both:
        source = open_source(path)
        assert names(source) == names(folder)
        for i in range(len(source)):
            assert read_image(source, i).tobytes() == read_image(folder, i).tobytes()
            assert source.path(i) == f"{path}/{source.name(i)}"
            with source.open(i) as file:
                assert file.seek(0, os.SEEK_END) == len(FILES[source.name(i)])


def test_what_info_zip_writes_has_the_names_of_the_folder(tmp_path):
    """Without the flag for UTF-8 names are in the code page of DOS, but on Unix they are what they are there."""
    made = make_zip(tmp_path / "p.zip", {"ü.png": png(), "e.png": png()})
    data = Path(made).read_bytes()
    for signature, at in ((b"PK\x01\x02", 8), (b"PK\x03\x04", 6)):
        parts = data.split(signature)
        data = signature.join([parts[0], *(p[: at - 4] + b"\0\0" + p[at - 2 :] for p in parts[1:])])
    Path(made).write_bytes(data)
    assert zipfile.ZipFile(made).namelist() == ["├╝.png", "e.png"]
    assert names(open_source(made)) == ["e.png", "ü.png"]
    Path(made).write_bytes(data.replace("ü.png".encode(), b"\x81\x81.png"))  # which is no UTF-8: ü in DOS
    assert names(open_source(made)) == ["e.png", "üü.png"]


def test_hidden_members_and_what_is_no_image_are_passed_over(tmp_path):
    files = {"a.png": b"1", ".b.png": b"2", "c/.d/e.png": b"3", "__MACOSX/._a.png": b"4", "__MACOSX/x.png": b"5",
             "n.TXT": b"6", "o": b"7", "f/": b"", "../up.png": b"8", "/abs.png": b"9", "./g/../h.png": b"10"}  # fmt: skip
    for path in (make_zip(tmp_path / "p.zip", files), make_tar(tmp_path / "p.tar", files)):
        source = open_source(path)
        assert content(source) == {"../up.png": b"8", "a.png": b"1", "abs.png": b"9", "g/../h.png": b"10"}
        assert source.skipped[".txt"] == 1 and source.skipped.total() in (2, 3)
    assert sorted(os.listdir(tmp_path)) == [".cache", "p.tar", "p.zip"]


def test_of_several_members_with_a_name_the_last_counts(tmp_path):
    with tarfile.open(tmp_path / "p.tar", "w") as tar:
        for name, data in (("a.png", b"1"), ("b.png", b"2"), ("./a.png", b"3")):
            add(tar, name, data)
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(tmp_path / "p.zip", "w") as archive:
        for name, data in (("a.png", b"1"), ("b.png", b"2"), ("a.png", b"3")):
            archive.writestr(name, data)
    for path in ("p.tar", "p.zip"):
        assert content(open_source(tmp_path / path)) == {"a.png": b"3", "b.png": b"2"}


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_links_sparse_files_and_long_names_of_a_tar(tmp_path, form):
    long = "/".join(["d" * 90] * 4) + "/ü.png"
    with tarfile.open(tmp_path / "p.tar", "w", format=form) as tar:
        add(tar, "a.png", b"1")
        add(tar, long, b"2")
        add(tar, "hard.png", type=tarfile.LNKTYPE, linkname="./a.png")
        add(tar, "to-nothing.png", type=tarfile.LNKTYPE, linkname="gone.png")
        add(tar, "soft.png", type=tarfile.SYMTYPE, linkname="a.png")
        add(tar, "pipe.png", type=tarfile.FIFOTYPE)
        add(tar, "folder.png", type=tarfile.DIRTYPE)
        add(tar, "z.png", b"3")
    source = open_source(tmp_path / "p.tar")
    assert content(source) == {"a.png": b"1", long: b"2", "hard.png": b"1", "z.png": b"3"}
    assert source.skipped == {"link": 3}
    with open(tmp_path / "holes.png", "wb") as file:
        file.seek(1 << 20)
        file.write(b"x")
    if os.system(f"cd {tmp_path} && tar --sparse -cf holes.tar holes.png && tar -rf holes.tar p.tar 2> /dev/null") == 0:
        index_of, skipped = archives.members(str(tmp_path / "holes.tar"))
        assert len(index_of) == 0 and skipped == {"sparse": 1, ".tar": 1}


def test_names_with_backslashes_are_those_of_windows(tmp_path):
    """Some programs there write them; a name that Unix has written may have one in it."""
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name, system in (("cat\\1.png", 0), ("dog\\2.png", 3), ("x/cow\\3.png", 0)):
            entry = zipfile.ZipInfo(name)
            entry.create_system = system
            archive.writestr(entry, b"x")
    assert names(open_source(tmp_path / "a.zip")) == ["cat/1.png", "dog\\2.png", "x/cow\\3.png"]


def test_links_in_a_zip_are_no_images(tmp_path):
    with zipfile.ZipFile(tmp_path / "p.zip", "w") as archive:
        link = zipfile.ZipInfo("link.png")
        link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "a.png")
        archive.writestr("a.png", png())
    source = open_source(tmp_path / "p.zip")
    assert names(source) == ["a.png"] and source.skipped == {"link": 1}


def test_large_zips_and_zips_behind_something_else(tmp_path):
    with zipfile.ZipFile(tmp_path / "p.zip", "w") as archive:
        with archive.open("a.png", "w", force_zip64=True) as file:
            file.write(png(1))
        archive.writestr("b.png", png(2), zipfile.ZIP_STORED)
    (tmp_path / "q.zip").write_bytes(b"#!/bin/sh\n" * 50 + (tmp_path / "p.zip").read_bytes())
    for name in ("p.zip", "q.zip"):
        assert content(open_source(tmp_path / name)) == {"a.png": png(1), "b.png": png(2)}


def test_archives_that_cannot_be_used_are_refused_in_words(tmp_path, both):
    zipped, tarred = (Path(path).read_bytes() for path in both)
    (tmp_path / "b").mkdir()
    for number, (name, data) in enumerate(
        [("z.zip", zipped[: len(zipped) * n // 8]) for n in range(8)]
        + [("t.tar", tarred[: len(FILES) * 1024 * n // 8]) for n in range(9)]
        + [("z.zip", b"text" * 300), ("t.tar", b"text" * 300), ("z.zip", tarred), ("t.tar", zipped)]
        + [("t.tar", tarred[:1024] + b"\xff" * 512 + tarred[1536:])]
    ):
        path = tmp_path / "b" / f"{number}{name}"
        path.write_bytes(data)
        with pytest.raises(InputError) as error:
            open_source(path)
        assert (
            "\n" not in str(error.value)
            and "damaged or cut short" in str(error.value)
            and str(path) in str(error.value)
        )


def test_what_is_compressed_as_a_whole_is_refused_with_the_remedy(tmp_path, both):
    with tarfile.open(tmp_path / "c.tar.gz", "w:gz") as tar:
        tar.add(both[1])
    for name in ("c.tar.bz2", "c.tgz", "c.txz", "c.tar"):
        (tmp_path / name).write_bytes((tmp_path / "c.tar.gz").read_bytes())
    for name, remedy in (("c.tar.gz", "gunzip {} makes {stem}, "), ("c.tgz", "gunzip {} makes {tar}, "), ("c.txz", "unxz {} "),
                         ("c.tar.bz2", "bunzip2 {} makes {stem}"), ("c.tar", "it is a .gz file, which gunzip unpacks")):  # fmt: skip
        path = str(tmp_path / name)
        with pytest.raises(InputError) as error:
            open_source(path)
        stem = os.path.splitext(path)[0]
        assert remedy.format(path, stem=stem, tar=f"{stem}.tar") in str(error.value)


def test_damaged_members_are_unreadable_images_with_a_reason(tmp_path):
    data = png(0, 64)
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        path = Path(make_zip(tmp_path / f"{method}.zip", {"a.png": data, "b.png": png(1)}, method))
        whole = path.read_bytes()
        path.write_bytes(whole[:200] + bytes(50) + whole[250:])
        source = open_source(path)
        assert "damaged" in reason(source) and isinstance(read_image(source, 1), Image.Image)
        path.write_bytes(b"XX" + whole[2:])
        assert "damaged: its header is not where" in reason(open_source(path))
    path = Path(make_zip(tmp_path / "methods.zip", {"a.png": data}, zipfile.ZIP_LZMA))
    assert "only deflate is" in reason(open_source(path))
    path = Path(make_zip(tmp_path / "encrypted.zip", {"a.png": data}))
    whole = bytearray(path.read_bytes())
    whole[whole.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(whole)
    assert reason(open_source(path)) == "it is encrypted"
    tar = Path(make_tar(tmp_path / "p.tar", {"a.png": data[:500], "b.png": b""}))
    assert "truncated" in reason(open_source(tar)) and "it is empty" in reason(open_source(tar), 1)


def test_bombs_do_not_burst(tmp_path, monkeypatch):
    path = Path(make_zip(tmp_path / "p.zip", {"a.png": bytes(10**6)}))
    whole = bytearray(path.read_bytes())
    struct.pack_into("<I", whole, whole.index(b"PK\x01\x02") + 24, 100)  # it says that it becomes 100 bytes
    path.write_bytes(whole)
    made = []
    inflated = archives._inflated
    monkeypatch.setattr(archives, "_inflated", lambda *a: made.append(inflated(*a)) or made[-1])
    assert "damaged" in reason(open_source(path)) and len(made[0]) == 101
    struct.pack_into("<I", whole, whole.index(b"PK\x01\x02") + 24, 2**31)
    path.write_bytes(whole)
    assert "2,147,483,648 bytes are too many for an image" in reason(open_source(path))


def test_an_archive_that_changes_or_goes_while_it_is_in_use_is_noticed(both):
    for path in both:
        source = open_source(path)
        os.utime(path, ns=(1, 1))
        assert "has changed since it was opened; start again" in reason(source)
        source = open_source(path)
        assert isinstance(read_image(source, 0), Image.Image)
        with open(path, "ab") as file:
            file.write(b"x")
        assert "has changed" in reason(source)
        os.unlink(path)
        assert reason(source) == f"{path} has gone"


def test_an_archive_is_looked_through_once_and_again_when_it_has_changed(tmp_path, both, monkeypatch):
    looked, members = [], archives.members
    monkeypatch.setattr(archives, "members", lambda path: looked.append(path) or members(path))
    for path in both:
        first = open_source(path)
        again = open_source(os.path.relpath(path))
        assert (
            content(again) == content(first) and again.skipped == first.skipped and looked.pop() == path and not looked
        )
        os.utime(path, ns=(1, 1))
        assert content(open_source(path)) == FILES and looked.pop() == path
    make_zip(both[0], {"new.png": png()})
    assert names(open_source(both[0])) == ["new.png"] and looked.pop()
    monkeypatch.setattr(cache, "VERSION", 2)
    assert names(open_source(both[0])) == ["new.png"] and looked.pop()
    monkeypatch.setattr(cache, "image_suffixes", lambda: frozenset({".png"}))
    assert names(open_source(both[0])) == ["new.png"] and looked.pop()


def test_a_damaged_cache_is_made_anew(tmp_path, both):
    expected = content(open_source(both[0]))
    (kept,) = (tmp_path / ".cache").glob("*.index")
    whole = kept.read_bytes()
    line, rest = whole.split(b"\n", 1)
    header = json.loads(line)
    header |= {"members": header["members"] - 1, "bytes": header["bytes"] + MEMBER.itemsize}
    fewer = json.dumps(header).encode() + b"\n" + rest
    for damaged in (
        b"",
        b"\n",
        b"{}\n",
        b"[1]\n",
        whole[:-1],
        whole[:100],
        b"\xff" * 200,
        whole[:-9] + b"x" * 9,
        fewer,
    ):
        kept.write_bytes(damaged)
        assert content(open_source(both[0])) == expected
        assert kept.read_bytes() == whole
    assert [*(tmp_path / ".cache").iterdir()] == [kept]  # no leftovers


def test_a_cache_that_cannot_be_written_is_said_once(tmp_path, both, monkeypatch, capfd):
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("D2V_CACHE", str(tmp_path / "file" / "below"))
    monkeypatch.setattr(cache, "_said", set())
    for path in both * 2:
        assert content(open_source(path)) == FILES
    err = capfd.readouterr().err
    assert len(err.splitlines()) == 1 and "cannot be written to (Not a directory)" in err and "D2V_CACHE" in err


def test_where_the_cache_is(monkeypatch, tmp_path):
    assert cache.cache_folder() == tmp_path / ".cache"
    monkeypatch.delenv("D2V_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache.cache_folder() == Path("/x/data2vec_vision")
    monkeypatch.delenv("XDG_CACHE_HOME")
    for system, place in (("linux", ".cache"), ("darwin", "Library/Caches"), ("win32", "AppData/Local")):
        monkeypatch.setattr(cache.sys, "platform", system)
        monkeypatch.delenv("LOCALAPPDATA", raising=False)
        assert cache.cache_folder() == Path.home() / place / "data2vec_vision"


def test_threads_read_at_once(both):
    for path in both:
        source = open_source(path)
        order = [n % len(source) for n in range(400)]
        random.Random(0).shuffle(order)
        with ThreadPoolExecutor(8) as threads:
            found = list(threads.map(source.open, order))
        assert [file.read() for file in found] == [FILES[source.name(i)] for i in order]


def in_a_process(source, queue):
    queue.put((content(source), len(source), source.fingerprint()))


def test_a_source_travels_without_handles_and_a_large_index_as_a_file(tmp_path, both, monkeypatch):
    sources = [open_source(path) for path in both] + [open_source([*both])]
    for source in sources:
        again = pickle.loads(pickle.dumps(source))
        assert content(again) == content(source) and again.fingerprint() == source.fingerprint()
    monkeypatch.setattr(index, "MAPPED", 0)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "spool"))
    (tmp_path / "spool").mkdir()
    spawn = multiprocessing.get_context("spawn")
    queue = spawn.Queue()
    process = spawn.Process(target=in_a_process, args=(sources[2], queue))
    process.start()
    assert queue.get(timeout=60) == (content(sources[2]), len(sources[2]), sources[2].fingerprint())
    process.join()
    assert len([*(tmp_path / "spool").glob("data2vec_vision-*.index")]) == 2  # of the two archives
    del source, sources, again
    assert not [*(tmp_path / "spool").glob("data2vec_vision-*.index")]


def test_what_travels_to_a_new_process_is_small(monkeypatch, tmp_path):
    """Of a large index the name of a file: of one that the cache has that file, as long as it is there."""
    monkeypatch.setattr(index, "MAPPED", 1000)
    monkeypatch.setattr(index, "get_spawning_popen", lambda: True)
    path = make_tar(tmp_path / "p.tar", {f"{n:04}.png": b"" for n in range(1000)})
    made, mapped = open_source(path), open_source(path)
    (kept,) = (tmp_path / ".cache").glob("*.index")
    data = pickle.dumps(mapped)
    assert len(data) < 1000 and str(kept).encode() in data and names(pickle.loads(data)) == names(made)
    kept.unlink()
    data = pickle.dumps(mapped)
    assert len(data) < 1000 and str(kept).encode() not in data and names(pickle.loads(data)) == names(made)
    monkeypatch.setattr("tempfile.mkstemp", lambda *a: (_ for _ in ()).throw(OSError("full")))
    assert names(pickle.loads(pickle.dumps(made))) == names(made)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("state.json", '{"_data_files": []}'),
        ("state.json", '{"_data_files": [{"filename": 5}]}'),
        ("state.json", "[" * 100_000),
        ("dataset_dict.json", '{"splits": {"a": 1}}'),
    ],
)
def test_a_data_set_with_rubbish_in_its_files_is_refused_in_a_line(tmp_path, name, text):
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "dataset_info.json").write_text("{}")
    (folder / "state.json").write_text('{"_data_files": [{"filename": "x.arrow"}]}')
    (folder / name).write_text(text)
    with pytest.raises(InputError) as error:
        open_source(folder)
    assert "\n" not in str(error.value)


def test_files_of_a_data_set_are_those_in_its_folder(tmp_path):
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "dataset_info.json").write_text("{}")
    (folder / "state.json").write_text('{"_data_files": [{"filename": "/etc/passwd"}]}')
    with pytest.raises(InputError, match="there is no file .*saved/passwd"):
        open_source(folder)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_is_no_archive(tmp_path):
    os.mkfifo(tmp_path / "x.zip")
    with pytest.raises(InputError, match="not a file"):
        open_source(tmp_path / "x.zip")
