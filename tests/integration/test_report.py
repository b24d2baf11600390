"""The page about a run: complete, self-contained, escaped, made of whatever a run has left behind, and fit for a browser."""

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import TINY, metrics
from PIL import Image

from data2vec_vision.__main__ import main

RUN = [option for option in TINY if option != "--no-report"]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, make_images):
    """A finished run of MAE with two saved epochs, in a folder that tests copy."""
    home = tmp_path_factory.mktemp("report")
    images = make_images(home / "images")
    (images / "class0" / "<b>torn.png").write_bytes(b"no image")
    options = ["--method", "mae", "--epochs", "4", "--save-every", "2", "--checkpoint-out-dir", str(home / "run")]
    assert main(["train", str(images), *RUN, *options]) == 0
    return home


@pytest.fixture
def run(finished, tmp_path):
    shutil.copytree(finished / "run", tmp_path / "run")
    return tmp_path / "run"


def page(run):
    return (run / "report.html").read_text(encoding="utf-8")


def test_train_writes_the_page_at_its_end_with_everything_on_it(run):
    html = page(run)
    for text in ("Too short a run to tell", "mae on ", "finished after 28 steps", "Loss", "RankMe", "What the model saw",
                 "What it reconstructs", "What the patch features tell apart", "Where it looks",
                 "What it finds alike", "A map of the images (PCA)", "Images that could not be read",
                 "How to repeat it", "mask_erase_pct", "torch "):  # fmt: skip
        assert text in html, text
    assert html.count("data:image/jpeg;base64,") == 6 and html.count("<svg") == 7
    last = metrics(run)[-1]
    assert f"{last['loss']:.4g}" in html and last["headline"] in html


def test_the_page_needs_no_network_and_no_other_file(run):
    html = re.sub(r'src="data:image/jpeg;base64,[^"]+"', "", page(run))
    assert not re.search(r"\b(?:src|href|url|@import|https?:|//cdn)\b", html.replace("viewBox", ""))


def test_names_of_files_are_text_and_not_html(run):
    html = page(run)
    assert "&lt;b&gt;torn.png" in html and "<b>torn" not in html


def test_the_printed_command_repeats_the_run(run, cli, finished):
    command = re.search(r'<pre id="command">(.*?)\n', page(run), re.DOTALL)[1].replace("&#39;", "'")
    program, *arguments = shlex.split(command.replace("&lt;", "<").replace("&amp;", "&"))
    assert program == "python" and arguments[:2] == ["-m", "data2vec_vision"]
    arguments[arguments.index("--checkpoint-out-dir") + 1] = "again"
    code, _, err = cli(*arguments[2:])
    assert code == 0, err
    assert [line["loss"] for line in metrics("again")] == [line["loss"] for line in metrics(run)]


def test_a_page_is_made_again_and_while_a_run_goes_on(run, cli):
    (run / "report.html").unlink()
    for path in [*run.glob("student_*.pt"), *run.glob("checkpoint_[0-9]*.pt")]:
        path.unlink()
    lines = (run / "metrics.jsonl").read_text().splitlines()[:20]
    (run / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 21, "lo']))  # a line that is being written
    code, out, err = cli("report", run)
    assert code == 0 and out == f"Wrote {run / 'report.html'}\n", err
    assert "at step 20" in page(run) and "epoch now" not in page(run) and "What it finds alike" in page(run)


def test_without_its_images_a_page_has_all_but_the_pictures(run, cli):
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"input_path": "gone"}))
    assert cli("report", run)[0] == 0
    assert "The pictures are left out: there is no folder gone" in page(run) and "data:image" not in page(run)
    assert page(run).count("<svg") == 7


def test_a_page_before_the_first_encoder_is_saved(run, cli):
    for path in run.glob("*.pt"):
        path.unlink()
    assert cli("report", run)[0] == 0
    assert "Pictures of features come with the first saved encoder" in page(run) and "What the model saw" in page(run)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: shutil.rmtree(run), "there is no folder"),
        (lambda run: (run / "config.json").unlink(), "holds no run: it has no config.json"),
        (lambda run: (run / "config.json").write_text("{"), "cannot be read as JSON"),
        (lambda run: (run / "metrics.jsonl").unlink(), "has no lines yet"),
        (lambda run: (run / "metrics.jsonl").write_text("rubbish\n[1]\n"), "has no lines yet"),
    ],
)
def test_what_is_no_run_is_refused_in_one_line(run, refused, spoil, message):
    spoil(run)
    assert message in refused("report", run)


def test_spoilt_lines_and_files_do_not_spoil_the_page(run, cli):
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(text.replace("\n", "\n\x00\x00\n", 1) + '{"step": 99, "loss": null}\n')
    (run / "student_3.evaluation.json").write_text("[]")
    (run / "student_3.confusion.png").write_text("no picture")
    assert cli("report", run)[0] == 0
    assert "student_3.evaluation.json" in page(run)


@pytest.mark.parametrize(
    "line",
    ['{"step": 2000, "loss": "abc"}', '{"step": 2000, "verdict": "x"}', '{"step": 2000, "epoch": "x"}', '{"step": "x"}',
     '{"step": 2000, "knn": [1], "steps": "12"}', '{"step": 2000, "loss": NaN}', '{"step": 2000, "lr": "\\ud800"}'],
)  # fmt: skip
def test_lines_of_other_types_do_not_spoil_the_page(run, cli, line):
    with open(run / "metrics.jsonl", "a") as file:
        file.write(line + "\n")
    assert cli("report", run)[0] == 0 and cli("report", run, "--csv", "m.csv")[0] == 0


def test_a_table_is_a_file_of_its_own(run, refused):
    text = (run / "metrics.jsonl").read_text()
    for name in (run / "metrics.jsonl", "", "metrics"):
        assert "must end in .csv" in refused("report", run, "--csv", name)
    assert (run / "metrics.jsonl").read_text() == text


def test_a_device_that_is_not_there_is_refused_and_the_page_kept(run, refused):
    before = page(run)
    assert "xyz" in refused("report", run, "--device", "xyz")
    assert page(run) == before


def test_what_a_page_lacks_is_said(run, cli, finished):
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"input_path": "gone"}))
    assert "The pictures are left out: there is no folder gone" in cli("report", run)[1]


def test_an_extended_run_is_not_finished_before_its_new_end(run, cli):
    text = (run / "metrics.jsonl").read_text()
    line = json.loads(text.splitlines()[-1]) | {"step": 40, "steps": 280}
    line = {name: value for name, value in line.items() if name not in ("verdict", "level", "headline", "text")}
    (run / "metrics.jsonl").write_text(text + json.dumps(line) + "\n")
    cli("report", run)
    assert "at step 40 of 280" in page(run) and "(step 28)" in page(run)


def test_an_evaluation_is_on_the_page_with_classes_that_had_no_test_image(run, cli):
    row = {"knn": 40.0, "linear": 51.0, "few_shot": {"1": {"mean": 19.2, "sd": 2.4}}}
    classes = [
        {"class": "cat", "test": 5, "knn": 20.0, "linear": 40.0},
        {"class": "dog", "test": 0, "knn": None, "linear": None},
    ]
    found = {"results": {"trained encoder": row}, "images": {"train": 20, "test": 5}, "test_path": None, "input_path": "pets",
             "verdict": "It has learned.", "standard_error": 1.1, "chance": 50.0, "per_class": classes}  # fmt: skip
    (run / "student_3.evaluation.json").write_text(json.dumps(found))
    assert cli("report", run)[0] == 0
    for text in ("It has learned.", "19.2 ± 2.4", "<td>cat</td>", "5 images of pets"):
        assert text in page(run), text
    assert "cannot be read" not in page(run) and "<td>dog</td>" not in page(run)


def test_csv_has_a_column_for_every_name(run, cli):
    import csv

    code, out, _ = cli("report", run, "--csv", "metrics.csv")
    assert code == 0 and out == "Wrote metrics.csv\n"
    with open("metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    lines = metrics(run)
    assert len(rows) == len(lines) and [float(r["loss"]) for r in rows] == [line["loss"] for line in lines]
    assert rows[-1]["headline"] == lines[-1]["headline"] and rows[0]["rankme"] == ""


def test_a_page_that_cannot_be_made_does_not_end_a_finished_run(cli, images, monkeypatch):
    from data2vec_vision import online

    monkeypatch.setattr(online, "report", lambda *a, **k: 1 / 0)
    code, out, err = cli("train", images, *RUN, "--epochs", 1, "--checkpoint-out-dir", "run")
    assert code == 0, err
    assert "The report could not be made: ZeroDivisionError" in out and "report run" in out


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
class TestInABrowser:
    """Headless Chromium opens the page from the disk."""

    def open(self, path, *options):
        call = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr",
                *options, Path(path).resolve().as_uri()]  # fmt: skip
        done = subprocess.run(call, capture_output=True, text=True, timeout=120)
        assert not re.search(r"CONSOLE.*(?:error|Uncaught)", done.stderr, re.IGNORECASE), done.stderr
        return done.stdout

    def shot(self, run, name, *options):
        self.open(run / "report.html", "--window-size=1100,1500", f"--screenshot={name}", *options)
        return Image.open(name).convert("RGB")

    def test_light_and_dark(self, run):
        light = self.shot(run, "light.png")
        dark = self.shot(run, "dark.png", "--blink-settings=preferredColorScheme=0")
        assert light.getpixel((5, 5)) == (246, 247, 249) and dark.getpixel((5, 5)) == (18, 21, 27)
        assert len(light.getcolors(2**24)) > 500, "charts, text and pictures have many shades"

    def test_a_curve_can_be_read_by_pointing_at_it(self, run):
        pointing = """<script>
          const svg = document.querySelector("svg[data-points]"), box = svg.getBoundingClientRect();
          svg.dispatchEvent(new PointerEvent("pointermove", {clientX: box.right, clientY: box.top}));
          document.title = svg.parentNode.querySelector("output").textContent;
        </script></body>"""
        Path("pointed.html").write_text(page(run).replace("</body>", pointing), encoding="utf-8")
        title = re.search(r"<title>(.*?)</title>", self.open("pointed.html", "--dump-dom"))[1]
        assert title == f"{metrics(run)[-1]['loss']:.4g} at step 28"

    def test_nothing_sticks_out_at_the_width_of_a_phone(self, run):
        narrow = """<script>
          document.documentElement.style.width = document.body.style.width = "360px";
          const wide = [...document.querySelectorAll("main > *, figure, .card, .tile, .chart")].filter(e => e.getBoundingClientRect().right > 360.5);
          document.title = "wide: " + wide.map(e => e.className + e.tagName).join(" ");
        </script></body>"""
        Path("narrow.html").write_text(page(run).replace("</body>", narrow), encoding="utf-8")
        title = re.search(r"<title>(.*?)</title>", self.open("narrow.html", "--dump-dom", "--window-size=500,900"))[1]
        assert title == "wide: "
