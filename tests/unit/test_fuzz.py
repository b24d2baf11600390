"""Every reader takes damaged files or refuses them in one clear line: the short form of tests/stress/fuzz.py."""

import importlib.util
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

SPEC = importlib.util.spec_from_file_location("fuzz", Path(__file__).parent.parent / "stress" / "fuzz.py")
fuzz = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(fuzz)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", fuzz.READERS)
def test_damaged_files_are_read_or_refused(name, tmp_path):
    whole = fuzz.READERS[name][1]()
    for data in whole:
        assert fuzz.give(name, data, tmp_path) or name in ("list", "csv")

    @settings(max_examples=25, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(whole), st.randoms(use_true_random=False))
    def damage(data, chance):
        fuzz.give(name, fuzz.damaged(data, chance), tmp_path)

    damage()
