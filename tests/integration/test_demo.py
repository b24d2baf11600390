"""The demo, shortened: it trains, extracts, measures, draws, and tells the truth."""

import re
from pathlib import Path

import pytest
from PIL import Image

from data2vec_vision.demo import demo
from data2vec_vision.errors import InputError


def test_the_demo_measures_three_things_and_draws(capfd):
    results = demo("demo", seed=0, epochs=1)
    out, _ = capfd.readouterr()
    assert 70 < results["raw pixels"] < 80
    for name, value in results.items():
        assert re.search(rf"{name} +{value:.1f} %", out)
    assert "student_0.pt" in out and "python -m data2vec_vision train path/to/your/images" in out
    picture = Image.open("demo/neighbours.png").convert("RGB")
    colours = {colour for _, colour in picture.getcolors(10**6)}
    assert {(60, 160, 80), (215, 70, 60)} <= colours
    assert len(list(Path("demo/images/train").rglob("*.png"))) == 1600
    assert len(list(Path("demo/images/test").rglob("*.png"))) == 400
    again = demo("demo", seed=0, epochs=1)
    assert again == results


def test_the_demo_keeps_out_of_other_folders(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(InputError, match="holds other files"):
        demo(str(tmp_path / "mine"))
    assert (tmp_path / "mine" / "thesis.txt").exists()
    (tmp_path / "project" / "images").mkdir(parents=True)
    (tmp_path / "project" / "run").mkdir()
    (tmp_path / "project" / "run" / "thesis.txt").write_text("x")
    with pytest.raises(InputError, match="holds other files"):
        demo(str(tmp_path / "project"))
    assert (tmp_path / "project" / "run" / "thesis.txt").exists()
    with pytest.raises(InputError, match="holds other files"):
        demo(str(tmp_path / "mine" / "thesis.txt"))
