"""The short form of tests/stress/kill.py: runs that are killed lose nothing, and end as those that are not."""

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "stress"))


def test_killed_runs_lose_nothing(tmp_path):
    from kill import OF_EPOCH, Kind, make_images, survive

    folder, archive = make_images(tmp_path)
    kinds = [Kind(archive, workers=2, each_step=True), Kind(folder, workers=0, each_step=False)]
    survive(kinds, 3, tmp_path, random.Random(0))
    assert sum(kind.kills for kind in kinds) >= 3 and all(kind.runs for kind in kinds)
    for kind in kinds:
        assert kind.unreadable == [] and kind.different == []
        assert kind.recomputed <= (1 if kind.each_step else OF_EPOCH)
