"""Processes that read images may be killed or hang: the batches are the same, or the error names the image."""

import faulthandler
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from data2vec_vision import loading
from data2vec_vision.data import start_worker
from data2vec_vision.errors import RunFailed
from data2vec_vision.failures import said_with
from data2vec_vision.loading import LoadingFailed, lasting, reading, sendable

IMAGES, BATCH = 24, 4


class Images(Dataset):
    """Image n is n; `fault` happens at image 9, every time or, with a file to remember it by, once."""

    def __init__(self, fault=None, once=None, seconds=0.0):
        self.fault, self.once, self.seconds = fault, once, seconds

    def __len__(self):
        return IMAGES

    def __getitem__(self, index):
        with reading(index):
            time.sleep(self.seconds)
            if index == 9 and self.fault and not (self.once and self.once.exists()):
                if self.once:
                    self.once.touch()
                self.fault()
            return torch.tensor(index)


def hang():
    """As a decoder does: no handler of a signal gets its turn."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    time.sleep(20)


def die(number):
    def killed():
        faulthandler.disable()  # pytest's, which would print where
        os.kill(os.getpid(), number)

    return killed


def batches(dataset, workers=2, tell=None):
    def make(done):
        left = range(done * BATCH, IMAGES)
        return DataLoader(
            dataset, BATCH, sampler=left, num_workers=workers, worker_init_fn=start_worker,
            collate_fn=lambda numbers: sendable(torch.stack(numbers)),
        )  # fmt: skip

    return lasting(make, "image {}".format, tell or (lambda text: None))


EXPECTED = [list(range(n, n + BATCH)) for n in range(0, IMAGES, BATCH)]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_without_a_fault_it_is_the_loader(workers):
    told = []
    assert [b.tolist() for b in batches(Images(), workers, told.append)] == EXPECTED and told == []


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS])
def test_a_process_that_is_killed_once_changes_nothing_and_is_said_once(tmp_path, number, workers):
    told = []
    dataset = Images(die(number), tmp_path / "once")
    assert [b.tolist() for b in batches(dataset, workers, told.append)] == EXPECTED
    assert len(told) == 1 and f"was ended by {number.name} while it read image 9" in told[0]


def test_one_that_hangs_once_is_killed_and_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "SLOWEST", 0.4)
    told = []
    assert [b.tolist() for b in batches(Images(hang, tmp_path / "once"), 2, told.append)] == EXPECTED
    assert len(told) == 1 and "hung for 0.4 s at image 9" in told[0]


@pytest.mark.parametrize(
    ("fault", "how", "advice"),
    [
        (die(signal.SIGKILL), "SIGKILL while it read image 9", "for want of memory perhaps: try --workers 1"),
        (die(signal.SIGBUS), "SIGBUS while it read image 9", "/dev/shm is full perhaps"),
        (die(signal.SIGABRT), "SIGABRT while it read image 9", "remove the image that does it"),
        (lambda: os._exit(3), "exit code 3 while it read image 9", "remove the image that does it"),
        (hang, "hung for 0.4 s at image 9", "see whether the disk answers, or remove the image"),
    ],
)
def test_one_that_is_lost_at_the_same_image_every_time_is_an_error_that_names_it(monkeypatch, fault, how, advice):
    monkeypatch.setattr(loading, "SLOWEST", 0.4 if fault is hang else 30)
    found = []
    with pytest.raises(LoadingFailed) as failed:
        found.extend(batch.tolist() for batch in batches(Images(fault)))
    assert found == EXPECTED[: len(found)] and len(found) <= 2  # image 9 is in the third
    assert "lost 3 times in a row; the last " in str(failed.value) and "\n" not in str(failed.value)
    assert how in str(failed.value) and advice in str(failed.value)


def test_losses_are_bounded_however_far_apart(monkeypatch):
    monkeypatch.setattr(loading, "RESTARTS", 2)
    dataset, found = Images(), []
    with pytest.raises(LoadingFailed, match="lost 3 times; the last was ended by SIGKILL"):
        for batch in (it := batches(dataset, 1)):
            found.append(batch.tolist())
            os.kill(it.gi_frame.f_locals["workers"]._batches._workers[0].pid, signal.SIGKILL)
    assert found == EXPECTED[:3]


def test_slow_images_are_not_one_that_hangs(monkeypatch):
    """A batch of four takes longer than any one image may."""
    monkeypatch.setattr(loading, "SLOWEST", 0.9)
    told = []
    assert [b.tolist() for b in batches(Images(seconds=0.25), 1, told.append)] == EXPECTED and told == []


def test_a_death_is_noticed_where_a_batch_is_waited_for_and_nowhere_else():
    """torch's handler would raise in whatever the main thread is at: in an optimizer step, say."""
    it, told = None, []
    it = batches(Images(seconds=0.02), 2, told.append)
    found = [next(it).tolist()]
    for process in loading.multiprocessing.active_children():
        os.kill(process.pid, signal.SIGKILL)
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        torch.ones(8).sum()
    found += [batch.tolist() for batch in it]
    assert found == EXPECTED and len(told) == 1


def test_an_error_of_the_dataset_stays_what_it_is():
    def fail():
        raise KeyError("of the dataset")

    with pytest.raises(KeyError, match="of the dataset"):
        list(batches(Images(fail)))


def test_processes_are_gone_when_nobody_wants_more():
    it = batches(Images(hang, seconds=0.01), 2)
    next(it)
    time.sleep(0.3)  # one hangs by now
    before = time.monotonic()
    it.close()
    assert loading.multiprocessing.active_children() == [] and time.monotonic() - before < 30


def test_what_cannot_be_sent_is_an_error_and_not_waited_for(monkeypatch):
    """torch sends in a thread of the worker, which prints such an error and sends nothing."""

    def full(self):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    expected = "/dev/shm, through which 2 processes send images, is full; try --workers 1"
    with pytest.raises(RunFailed, match=expected), said_with(4, 2, torch.device("cpu")):
        list(batches(Images()))
    assert len(list(batches(Images(), 0))) == 6


@pytest.mark.skipif(not Path("/dev/shm").exists(), reason="there is no shared memory in a file system")
def test_a_batch_is_in_shared_memory_when_a_worker_made_it():
    assert all(batch.is_shared() for batch in batches(Images(), 1))
    assert not any(batch.is_shared() for batch in batches(Images(), 0))
