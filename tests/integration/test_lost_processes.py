"""Processes that are slow, that fail, die or start again, and machines that do not see the same files."""

import contextlib
import dataclasses
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import TINY, metrics
from several import Together
from test_processes import torchrun
from test_same_run import configuration, configuration_in

from data2vec_vision import data, device, distributed, plan, train
from data2vec_vision.config import TrainConfig
from data2vec_vision.errors import InputError, RunFailed
from data2vec_vision.run import caught_signals


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_images):
    folder = tmp_path_factory.mktemp("lost")
    make_images(folder / "images")
    return folder


@pytest.fixture(scope="module")
def two(folder):
    group = Together(2, folder)
    yield group
    group.end()


def outcome(config, spoil=None):
    """How `train` ends here: ("done" or the error's type, its text, whether this process tells the user of it)."""
    with spoil() if spoil and distributed.rank() == 1 else contextlib.nullcontext():
        try:
            train.train(config)
        except (InputError, RunFailed) as error:
            return type(error).__name__, str(error), distributed.speaks()
    return "done", "", False


def fewer_images():
    """As on a shared file system that does not show the last files yet."""
    return replaced(plan, "open_source", lambda inputs: without_last(original_source(inputs)))


original_source = plan.open_source


def without_last(source):
    class Fewer(type(source)):
        def __len__(self):
            return super().__len__() - 1

        def fingerprint(self):
            return "other"

    source.__class__ = Fewer
    return source


def other_precision():
    """As on a machine of another kind."""
    return replaced(plan, "multiplies_bf16", lambda device: not original_bf16(device))


original_bf16 = plan.multiplies_bf16


def other_cadence():
    """A script that is not the same everywhere."""

    def resolved(config, facts):
        config, reasons = original_resolve(config, facts)
        return dataclasses.replace(config, log_every=2), reasons

    return replaced(plan, "resolve", resolved)


original_resolve = plan.resolve


def no_images():
    def lacking(inputs):
        raise InputError("there is no folder images")

    return replaced(plan, "open_source", lacking)


@contextlib.contextmanager
def elsewhere():
    """As on a machine that has not got the folder of the run."""
    here = os.getcwd()
    os.makedirs("other machine", exist_ok=True)
    os.chdir("other machine")
    try:
        yield
    finally:
        os.chdir(here)


def sleepy():
    def late(key):
        time.sleep(0.05)
        return original_item(key[0], key[1])

    return replaced(data.StreamDataset, "__getitem__", lambda *key: late(key))


original_item = data.StreamDataset.__getitem__


def failing():
    def broken(*arguments):
        for number, step in enumerate(original_steps(*arguments)):
            if number == 3:
                raise ValueError("a cosmic ray")
            yield step

    return replaced(train, "training_steps", broken)


original_steps = train.training_steps


@contextlib.contextmanager
def replaced(module, name, value):
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def small(folder, name, **more):
    return configuration_in(configuration(folder / "images", "data2vec", epochs=2, log_every=1, **more), folder / name)


@pytest.mark.parametrize(
    ("spoil", "more", "message"),
    [
        (fewer_images, {}, "sees 23 images in {images}, process 0 on {host} 24; a shared file system shows new"),
        (
            other_precision,
            {"precision": "auto"},
            "--precision is {here} in process 0 on {host} and {there} in process 1 on",
        ),
        (other_cadence, {}, "--log-every is 1 in process 0 on {host} and 2 in process 1 on"),
        (no_images, {}, "there is no folder images (found by process 1 only)"),
    ],
)
def test_what_one_process_finds_ends_all_with_one_line(two, folder, spoil, more, message):
    (kind, text, tells), (other_kind, other_text, other_tells) = two(outcome, small(folder, "none", **more), spoil)
    here, there = ("bf16", "fp32") if original_bf16(torch.device("cpu")) else ("fp32", "bf16")
    expected = message.format(images=folder / "images", host=platform.node(), here=here, there=there)
    assert kind == other_kind == "InputError" and expected in text == other_text
    assert {tells, other_tells} == {True, False}
    assert not (folder / "none").exists()


def test_a_folder_that_holds_a_run_is_seen_by_the_main_process_for_all(two, folder):
    (folder / "used").mkdir()
    (folder / "used/student_1.pt").touch()
    there = configuration_in(small(folder, "used"), "used")  # which the second process does not see
    (kind, text, _), (other_kind, other_text, _) = two(outcome, there, elsewhere)
    assert kind == other_kind == "InputError" and "holds a run already" in text == other_text


def test_a_slow_process_and_one_without_the_files_of_the_run_go_on_as_others(two, folder):
    """The second process sleeps; then the run goes on where that one cannot see the checkpoint: the first reads it."""
    assert [kind for kind, *_ in two(outcome, small(folder, "calm"))] == ["done", "done"]
    assert [kind for kind, *_ in two(outcome, small(folder, "slow", save_every=1), sleepy)] == ["done", "done"]
    for line, other in zip(metrics(folder / "calm"), metrics(folder / "slow"), strict=True):
        assert line["loss"] == other["loss"]
    shutil.copytree(folder / "slow", folder / "again")
    relative = TrainConfig(resume_checkpoint="again/checkpoint_0.pt")
    assert [kind for kind, *_ in two(outcome, relative, elsewhere)] == ["done", "done"]
    assert [m["loss"] for m in metrics(folder / "again")] == [m["loss"] for m in metrics(folder / "calm")]


def test_the_process_that_fails_tells_and_the_other_is_silent(two, folder):
    (kind, text, tells), (other_kind, other_text, other_tells) = two(outcome, small(folder, "failed"), failing)
    assert kind == other_kind == "RunFailed"
    assert not tells and "another process of the run has ended without a word" in text
    assert other_tells and "a cosmic ray" in other_text


def waits_in_vain(path):
    """The first process waits, in C++, for one that does not come; and gets torchrun's SIGTERM."""
    distributed.start()
    if distributed.rank() == 1:
        time.sleep(60)
    os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY), 2)
    distributed.STUCK, os.environ["TORCHELASTIC_RUN_ID"] = 0.5, "run"
    with caught_signals() as signals, distributed.patient(signals, lambda: "the other one is gone"):
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        distributed.any_process(True)


def test_a_process_that_waits_for_a_lost_one_without_end_says_so_and_ends(folder):
    group = Together(2, folder)
    group.begin(waits_in_vain, folder / "said.txt")
    group.processes[0].join(30)
    code = group.processes[0].exitcode
    group.end(0)  # else a process that waits for ever would keep this one
    assert code == 1
    assert (folder / "said.txt").read_text() == "Error: the other one is gone\n"


def test_each_process_takes_a_gpu_that_it_sees(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert device.own_gpu() == 0  # the launcher shows each its own
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert device.own_gpu() == 3
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    with pytest.raises(InputError, match=r"4 processes .* 2 GPUs \(CUDA_VISIBLE_DEVICES=4,5\); use --nproc-per-node 2"):
        device.own_gpu()


def test_two_processes_with_one_gpu_are_told_so(images, monkeypatch):
    job = plan.prepare(configuration(images, "mae"))
    monkeypatch.setattr(plan, "gpu_identity", lambda device: "GPU-1")
    monkeypatch.setattr(distributed, "everyone", lambda mine: [mine, mine])
    with pytest.raises(InputError, match="2 processes have the same GPU of .*; start one process for each GPU"):
        plan.agree(job)
    monkeypatch.setattr(distributed, "everyone", lambda mine: [mine, {**mine, "gpu": "GPU-2"}])
    plan.agree(job)


KILLED = """
import os, signal
from data2vec_vision.methods.data2vec import Data2Vec
class Killed(Data2Vec):
    '''Its second process is killed in its sixth step, the first time.'''
    calls = 0
    def training_step(self, views, masks):
        self.calls += 1
        if self.calls == 6 and (os.environ.get("RANK"), os.environ.get("TORCHELASTIC_RESTART_COUNT")) == ("1", "0"):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().training_step(views, masks)
"""


def test_a_killed_process_ends_all_with_a_line_and_torchrun_starts_them_again(cli, images):
    """By the command that began the run, from the last checkpoint, which is of the step before."""
    Path("killed.py").write_text(KILLED)
    options = [*TINY, "--epochs", 3, "--checkpoint-minutes", 1e-6, "--checkpoint-out-dir"]
    again = ["--method", "killed.py", "--resume-checkpoint", "auto"]
    run = torchrun(2, "train", images, *options, "two", *again, launcher=["--max-restarts", "1"])
    assert run.returncode == 0, run.stderr
    [error] = [line for line in run.stderr.splitlines() if line.startswith("Error: ")]
    assert "another process of the run has ended without a word: it was killed" in error
    assert error.endswith(
        "torchrun --nproc-per-node 2 -m data2vec_vision train --resume-checkpoint two/checkpoint_last.pt"
    )
    said = run.stdout.splitlines()
    assert said.count("There is no checkpoint in two to go on with; a fresh run begins.") == 1
    assert said.count("Resumed  from two/checkpoint_last.pt after step 5 of 18") == 1
    assert [line["step"] for line in metrics("two")] == list(range(1, 19))
    cli("train", images, *options, "one", "--method", "killed.py")
    for one, two in zip(metrics("one"), metrics("two"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-3)


TWO_NODES = """
set -e
unshare -n sleep 300 & other=$!
trap "kill $other" EXIT
while [ "$(readlink /proc/$other/ns/net)" = "$(readlink /proc/$$/ns/net)" ]; do sleep 0.05; done
on_other="nsenter -t $other -n"
ip link set lo up
ip link add node0 type veth peer name node1 netns $other
ip addr add 10.77.0.1/24 dev node0
ip link set node0 up
$on_other ip link set lo up
$on_other ip addr add 10.77.0.2/24 dev node1
$on_other ip link set node1 up
$on_other ping -c 1 -W 5 10.77.0.1 > /dev/null 2>&1 || sleep 1
launch="$PYTHON -m torch.distributed.run --nnodes 2 --nproc-per-node 1 --master-addr 10.77.0.1 --master-port 29507"
mkdir elsewhere
(cd elsewhere; GLOO_SOCKET_IFNAME=node1 $on_other $launch --node-rank 1 "$@" > ../node1.txt 2>&1) & second=$!
GLOO_SOCKET_IFNAME=node0 $launch --node-rank 0 "$@" > node0.txt 2>&1
wait $second
"""


def test_two_machines_that_share_the_images_only(cli, images):
    """Two networks joined by a cable, each with a folder of its own: only the first one's gets the files of the run."""
    probe = "unshare -n true && ip link add d2v0 type veth peer name d2v1"
    try:
        able = subprocess.run(["unshare", "-rn", "sh", "-c", probe], capture_output=True, text=True)
    except FileNotFoundError as error:
        pytest.skip(f"needs util-linux and iproute2: {error}")
    if able.returncode:
        pytest.skip(f"no network namespaces here: {able.stderr.strip()}")
    train = ["-m", "data2vec_vision", "train", str(images), *TINY, "--epochs", "1", "--checkpoint-out-dir", "two"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
    command = ["unshare", "-rn", "sh", "-c", TWO_NODES, "sh", *train]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    said = [Path(f"node{n}.txt").read_text() for n in range(2)]
    assert run.returncode == 0, (run.stderr, *said)
    assert "2 processes of 2 each" in said[0] and said[0].count("Done.") == 1 and "Done." not in said[1]
    assert not Path("elsewhere/two").exists()
    cli("train", images, *TINY, "--epochs", 1, "--checkpoint-out-dir", "one")
    for one, two in zip(metrics("one"), metrics("two"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-3)
