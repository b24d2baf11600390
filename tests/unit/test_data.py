"""The stream: what a step sees depends on the seed and the step alone."""

import contextlib
import os
import signal
import socket
import subprocess
import sys

import pytest
import torch

from data2vec_vision.data import (
    BAD_TRIES,
    Batch,
    MicroBatches,
    Stream,
    StreamDataset,
    collate,
    make_loader,
    start_worker,
)
from data2vec_vision.methods.data2vec import BlockMasks
from data2vec_vision.sources import open_source
from data2vec_vision.transforms import Views, augmentation


def dataset(images, seed=0):
    return StreamDataset(
        open_source(images), Views(augmentation((16, 16), color_jitter=0.4)), BlockMasks((4, 4), 10), seed, 4
    )


def batches(images, workers=0, first=0, last=3, batch_size=4, passes=2, context=None, seed=0):
    data = dataset(images, seed)
    micro = MicroBatches(Stream(len(data.source), seed), batch_size, passes, first, last)
    return list(make_loader(data, micro, workers, pin=False, context=context))


def equal(a: Batch, b: Batch):
    return (
        all(map(torch.equal, a.views, b.views)) and torch.equal(a.masks["query"], b.masks["query"]) and a.bad == b.bad
    )


def test_every_pass_over_the_stream_holds_each_image_once_in_a_fresh_order():
    stream = Stream(10, seed=3)
    passes = [[stream.image(p) for p in range(e * 10, e * 10 + 10)] for e in range(3)]
    assert all(sorted(p) == list(range(10)) for p in passes)
    assert passes[0] != passes[1] != passes[2]
    again = Stream(10, seed=3)
    assert [again.image(p) for p in (25, 3, 14)] == [passes[2][5], passes[0][3], passes[1][4]]
    assert [Stream(10, seed=4).image(p) for p in range(10)] != passes[0]


def test_steps_slice_the_stream_without_gaps_also_across_epochs():
    stream = Stream(10, seed=0)
    rows = list(MicroBatches(stream, 4, 2, 0, 3))
    assert [p for row in rows for p, _ in row] == list(range(24))
    assert all(image == stream.image(p) for row in rows for p, image in row)
    assert list(MicroBatches(stream, 4, 2, 1, 3)) == rows[2:]
    assert len(MicroBatches(stream, 4, 2, 1, 3)) == 4


def test_batch_size_and_accumulation_only_slice_a_step():
    stream = Stream(10, seed=0)
    assert sum(MicroBatches(stream, 8, 1, 0, 3), []) == sum(MicroBatches(stream, 2, 4, 0, 3), [])


def test_processes_share_each_pass():
    stream = Stream(10, seed=0)
    one = list(MicroBatches(stream, 4, 2, 0, 3))
    two = [list(MicroBatches(stream, 4, 2, 0, 3, rank, 2)) for rank in (0, 1)]
    assert [a + b for a, b in zip(*two)] == one


def test_a_folder_smaller_than_a_step_repeats_with_fresh_views(images):
    data = dataset(images)
    stream = Stream(24, 0)
    position = next(p for p in range(24, 48) if stream.image(p) == stream.image(0))
    first, later = data[0, stream.image(0)], data[position, stream.image(0)]
    assert not torch.equal(first.views[0], later.views[0])


def test_views_and_masks_do_not_depend_on_workers_or_on_where_a_run_was_resumed(images):
    plain = batches(images)
    for workers in (1, 2):
        assert all(map(equal, batches(images, workers), plain))
    resumed = batches(images, workers=2, first=1)
    assert len(resumed) == 4 and all(map(equal, resumed, plain[2:]))
    assert not equal(batches(images, seed=1)[0], plain[0])


def test_workers_started_by_spawn_give_the_same(images):
    assert all(map(equal, batches(images, workers=1, last=1, context="spawn"), batches(images, last=1)))


def test_making_views_disturbs_nobody_elses_random_numbers(images):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    batches(images, workers=0)
    assert torch.equal(torch.rand(3), expected)


def test_collate_stacks_views_and_masks(images):
    data = dataset(images)
    batch = collate([data[p, p] for p in range(3)])
    assert [v.shape for v in batch.views] == [(3, 3, 16, 16)] and batch.views[0].dtype == torch.uint8
    assert batch.masks["query"].shape == (3, 10)
    assert batch.to(torch.device("cpu")).masks.keys() == {"query"}


def test_an_unreadable_image_is_replaced_by_the_same_one_every_time(images):
    source = open_source(images)
    (images / source.name(5)).write_text("no image")
    data = dataset(images)
    one, two = data[0, 5], data[0, 5]
    assert torch.equal(one.views[0], two.views[0])
    assert list(one.bad) == [5] and "cannot identify" in one.bad[5]
    assert data[0, 6].bad == {}


def test_when_nothing_can_be_read_it_gives_up_after_some_tries(images):
    for path in images.rglob("*.*"):
        path.write_text("no image")
    sample = dataset(images)[0, 5]
    assert 1 < len(sample.bad) <= BAD_TRIES + 1 and sample.views[0].shape == (3, 16, 16)


def test_workers_leave_interrupts_to_the_main_process(images):
    import os
    import signal

    data = dataset(images)
    loader = iter(make_loader(data, MicroBatches(Stream(24, 0), 4, 1, 0, 6), 1, pin=False))
    next(loader)
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(loader._workers[0].pid, number)
    assert len(list(loader)) == 5


@pytest.mark.parametrize("threads", [1, 2])
def test_views_are_made_in_one_thread_and_the_number_is_restored(images, threads):
    before = torch.get_num_threads()
    seen = []
    data = dataset(images)
    data.views = lambda image: [torch.zeros(1)] * (seen.append(torch.get_num_threads()) or 1)
    try:
        torch.set_num_threads(threads)
        _ = data[0, 0]
        assert seen == [1] and torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


HANGING = """
import sys, time
import torch.utils.data._utils as utils
from torch.utils.data import DataLoader, Dataset
from data2vec_vision.data import start_worker

utils.MP_STATUS_CHECK_INTERVAL = 0.2  # seconds that the loader waits for a worker before it sends SIGTERM

class Hanging(Dataset):
    def __len__(self):
        return 10

    def __getitem__(self, index):
        end = time.monotonic() + 600
        while time.monotonic() < end:
            time.sleep(1)

batches = iter(DataLoader(Hanging(), num_workers=1, worker_init_fn=start_worker))
time.sleep(1)
del batches
print("ended")
"""


def test_a_worker_that_hangs_does_not_keep_the_command_from_ending():
    done = subprocess.run([sys.executable, "-c", HANGING], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout == "ended\n", done.stderr


def test_a_worker_outlives_the_first_signal_to_the_group():
    """A scheduler's SIGTERM reaches the workers too, and the step under way still needs them."""
    code = """
import os, signal
from data2vec_vision.data import start_worker
start_worker(0)
os.kill(os.getpid(), signal.SIGINT)
os.kill(os.getpid(), signal.SIGTERM)
print("alive", flush=True)
os.kill(os.getpid(), signal.SIGTERM)
print("never", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "alive\n" and done.returncode == -signal.SIGTERM


def test_a_long_path_of_tmpdir_does_not_make_a_loader_wait_for_ever(tmp_path):
    long = tmp_path / ("x" * 90)
    long.mkdir()
    code = """
import torch
from torch.utils.data import DataLoader
from data2vec_vision.data import start_worker
print(sum(int(x.sum()) for x in DataLoader(torch.ones(8, 4), batch_size=2, num_workers=1, worker_init_fn=start_worker)))
"""
    environment = {**os.environ, "TMPDIR": str(long)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment)
    assert done.stdout == "32\n", done.stderr


@pytest.mark.skipif(not hasattr(signal, "set_wakeup_fd") or os.name != "posix", reason="needs fork")
def test_a_worker_does_not_tell_the_main_process_of_its_signals():
    """Under torchrun the main process listens for its own, at a socket that forked processes have too."""
    ours, theirs = socket.socketpair()
    ours.settimeout(0.5)
    theirs.setblocking(False)
    before = signal.set_wakeup_fd(theirs.fileno())
    try:
        if not (child := os.fork()):
            start_worker(0)
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        with contextlib.suppress(TimeoutError):  # the end of a child is a signal too
            assert signal.SIGTERM not in ours.recv(100)
    finally:
        signal.set_wakeup_fd(before)
        ours.close()
        theirs.close()
