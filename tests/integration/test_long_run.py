"""The short form of tests/stress/long_run.py: nothing grows with the number of steps."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "stress"))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="there is no /proc")
def test_files_threads_memory_and_logs_do_not_grow(tmp_path):
    from long_run import grown, measure

    samples = measure(tmp_path, steps=300, log_every=10, minutes=0.005)
    assert [s.step for s in samples] == list(range(30, 301, 30)) and samples[-1].checkpoints > 3
    assert grown(samples) == []
    assert samples[-1].log < 80  # bytes a step, a line of 10 steps
