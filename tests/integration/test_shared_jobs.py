"""`extract` and `evaluate` under torchrun: what one process writes, of images that two share; stops and errors."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from conftest import TINY

# Commands one after the other in each of the processes; the second process may be stopped in its first batch or fail in its second.
SCRIPT = """
import json, os, signal, sys
from data2vec_vision import extract
from data2vec_vision.__main__ import main
rank, read, what = os.environ["RANK"], extract.Images.__getitem__, []
def ends(self, index):
    if rank == "1" and index == 9 and what == ["stop"]:
        os.kill(os.getpid(), signal.SIGTERM)
    if rank == "1" and index >= 15 and what == ["fail"]:
        raise RuntimeError("no such luck")
    return read(self, index)
extract.Images.__getitem__ = ends
for line in open("commands"):
    name, *arguments = json.loads(line)
    what[:] = [name]
    code = main(arguments)
    with open(f"codes{rank}", "a") as file:
        print(code, file=file)
sys.exit(code)
"""


def in_two_processes(*commands):
    """Each command is a word and its arguments. Returns what was written to stdout and stderr, and the exit codes."""
    Path("script.py").write_text(SCRIPT)
    Path("commands").write_text("".join(json.dumps([str(word) for word in c]) + "\n" for c in commands))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = subprocess.run(
        [*launcher, "script.py"],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    codes = [Path(f"codes{rank}").read_text().split() for rank in (0, 1) if Path(f"codes{rank}").exists()]
    return run.stdout, run.stderr, codes


def test_two_processes_write_what_one_writes_and_stop_and_fail_together(cli, images):
    """24 images in 5 batches, of which the second process has two; the last image of all is in the first's."""
    cli("train", images, *TINY, "--epochs", 1, "--checkpoint-out-dir", "run")
    for name in ("class0/000.png", "class2/023.jpeg"):  # in the first and the last batch
        (images / name).write_bytes(b"no image")
    (images / "class1" / "013.jpg").write_bytes(b"no image")  # in the second process's
    extract = ["extract", "run/student_0.pt", images, "--workers", 0, "--batch-size", 5, "--output"]
    evaluate = ["evaluate", "run/student_0.pt", images, "--workers", 1, "--batch-size", 5, "--k", 3, "--json"]
    assert cli(*extract, "one.npz")[0] == cli(*extract, "one.npy", "--pool", "grid")[0] == 0
    code, told, err = cli(*evaluate, "one.json", "--picture", "one.png")
    assert code == 0, err
    out, err, codes = in_two_processes(
        ["", *extract, "two.npz"],
        ["", *evaluate, "two.json", "--picture", "two.png"],
        ["stop", *extract, "two.npy", "--pool", "grid"],
        ["", *extract, "two.npy", "--pool", "grid", "--resume"],
        ["stop", *extract, "three.npy"],
        ["fail", *extract, "none.npy"],
    )
    assert codes[0][:5] == ["0", "0", "143", "0", "143"], err
    with np.load("one.npz") as one, np.load("two.npz") as two:
        assert len(one["paths"]) == 21 and one["paths"].tolist() == two["paths"].tolist()
        assert one["features"].tobytes() == two["features"].tobytes()
    assert Path("one.bad_files.txt").read_bytes() == Path("two.bad_files.txt").read_bytes()
    assert Path("one.npy").read_bytes() == Path("two.npy").read_bytes()
    one, two = (json.loads(Path(f"{name}.json").read_text()) for name in ("one", "two"))
    assert one == two and told.split("\n\nWrote")[0] in out
    assert out.count("Wrote two.npz:") == out.count("Wrote two.npy:") == out.count("Wrote two.json") == 1
    assert out.count("3 images could not be read and are left out") == 2
    assert err.count("Stopped after 10 of 24 images; the same command with --resume goes on") == 2
    ours = [line for line in err.splitlines() if line.startswith("Error: ")]
    assert ours == ["Error: RuntimeError: no such luck; --debug shows where"] and not Path("none.npy").exists()
    assert cli(*extract, "three.npy", "--resume")[0] == 0  # what two have begun one can finish
    with np.load("one.npz") as one:
        assert np.load("three.npy").tobytes() == one["features"].tobytes()
