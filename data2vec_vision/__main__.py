"""The command line: one thin command per job. torch is imported inside the commands, not for `--help`."""

import contextlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from typing import Any

import click

from data2vec_vision.config import GROUPS, TrainConfig, field_type, fields, flag, read_config
from data2vec_vision.errors import InputError, RunFailed, Stopped


class Auto(click.ParamType):
    """A value of another type, or the word auto, which leaves the choice to the program."""

    def __init__(self, kind: type):
        self.inner = click.types.convert_type(kind)
        self.name = self.inner.name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return None if value == "auto" else self.inner.convert(value, param, ctx)


class GroupedCommand(click.Command):
    """A command whose `--help` lists its options under the headings of config.GROUPS."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for group in GROUPS:
            rows = [
                record
                for param in self.get_params(ctx)
                if group == (fields()[param.name].metadata["group"] if param.name in fields() else None)
                and (record := param.get_help_record(ctx))
            ]
            with formatter.section(group):
                formatter.write_dl(rows)


def train_option(name: str) -> click.Option:
    """The option of a field of TrainConfig."""
    field, kind = fields()[name], field_type(name)
    meta = field.metadata
    help = meta["help"] + (f"  [auto: {meta['auto']}]" if meta["auto"] else "")
    if name in ("compile", "grad_checkpointing", "deterministic"):  # a resumed run may turn it off
        return click.Option([f"{flag(name)}/--no-{flag(name)[2:]}"], default=field.default, help=help)
    if kind is bool:
        return click.Option([flag(name)], is_flag=True, help=help)
    if name == "set":
        return click.Option([flag(name)], multiple=True, metavar=meta["metavar"], help=help)
    if meta["choices"]:
        return click.Option(
            [flag(name)],
            type=click.Choice(meta["choices"]),
            metavar=meta["metavar"] or None,
            default=field.default,
            help=help,
        )
    return click.Option(
        [flag(name)],
        type=Auto(kind) if meta["auto"] and field.default is None else kind,
        default=field.default,
        metavar=meta["metavar"] or None,
        show_default=field.default is not None,
        help=help,
    )


OUTPUT = "Where to write: a name ending in .npz, .npy, .parquet, .csv, .pt or .safetensors."
POOL = "One vector an image, or all its patches, as a list or in rows and columns.  [default: the method's]"
LAYER = (
    "Take the output of this block before the final norm, 1 the first, -1 the last.  [default: after the final norm]"
)
RESUME = "Go on after an interruption, from the rows kept beside --output."
ENCODER = "Which one of a training checkpoint."


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="data2vec_vision")
def cli() -> None:
    """Pretrain Vision Transformers by self-supervision on a folder of your own images.

    \b
    python -m data2vec_vision train photos/
    python -m data2vec_vision extract runs/photos-data2vec/student_99.pt photos/ --output features.npz
    """


@click.pass_context
def train_command(ctx: click.Context, **values: Any) -> None:
    """Pretrain on images: folders, lists (.txt, .csv), archives (.zip, .tar, .parquet), folders or 'patterns' of
    archives, and what save_to_disk wrote.

    \b
    python -m data2vec_vision train photos/
    python -m data2vec_vision train photos/ --image-size 32 --patch-size 4 --hidden-dim 192 --n-encoders 6
    """
    typed = {
        name: value
        for name, value in values.items()
        if ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
    }
    if typed.get("config"):
        values |= read_config(typed["config"], typed)
    if values["workers"] != 0:
        # Before torch is imported: computing threads that spin while they wait take the cores from the workers.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with deaf_to_sigusr1():
        if values["dry_run"]:
            from data2vec_vision.dry_run import dry_run as job
        else:
            from data2vec_vision.train import train as job
        job(TrainConfig(**values), typed)


@contextlib.contextmanager
def deaf_to_sigusr1() -> Iterator[None]:
    """Inside, SIGUSR1 does not end the process: it asks a run to save, and before the first step there is nothing to.

    Afterwards it is as before, for what a process ignores the processes that it starts ignore too.
    """
    if not hasattr(signal, "SIGUSR1") or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)


cli.add_command(
    GroupedCommand(
        "train",
        callback=train_command,
        params=[click.Argument(["input_path"], nargs=-1, metavar="INPUT_PATH..."), *map(train_option, fields())],
        help=train_command.__doc__,
    )
)


@cli.command()
@click.argument("checkpoint")
@click.argument("input_path", nargs=-1, required=True)
@click.option("--output", required=True, metavar="FILE", help=OUTPUT)
@click.option("--pool", type=click.Choice(["mean", "cls", "patch", "grid"]), help=POOL)
@click.option("--layer", type=int, metavar="N", help=LAYER)
@click.option("--resume", is_flag=True, help=RESUME)
@click.option(
    "--encoder",
    type=click.Choice(["student", "teacher"]),
    default="student",
    show_default=True,
    help=ENCODER,
)
@click.option("--batch-size", type=click.IntRange(1), default=64, show_default=True, help="Images in one forward pass.")
@click.option("--workers", type=click.IntRange(0), help="Processes that read images.  [default: from the cores]")
@click.option("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps, ...  [default: the best present]")
@click.option(
    "--precision", type=click.Choice(["fp32", "bf16"]), default="fp32", show_default=True, help="Of the forward pass."
)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def extract(checkpoint: str, input_path: tuple[str, ...], output: str, debug: bool, **options: Any) -> None:
    """Write the features of the images of INPUT_PATH, as `train` takes it, by the encoder in the file CHECKPOINT.

    \b
    python -m data2vec_vision extract student_99.pt photos/ --output features.npz
    """
    from data2vec_vision.extract import extract

    extract(checkpoint, input_path, output, **options)


@cli.command()
@click.argument("run_dir")
@click.option("--csv", metavar="FILE", help="Write the lines of metrics.jsonl to a table instead.")
@click.option("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps, ...  [default: the run's]")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def report(run_dir: str, csv: str | None, device: str | None, debug: bool) -> None:
    """Write RUN_DIR/report.html: a page about a run, finished or still going.

    \b
    python -m data2vec_vision report runs/photos-data2vec
    python -m data2vec_vision report runs/photos-data2vec --csv metrics.csv
    """
    from data2vec_vision.report import report, write_csv

    if csv is not None:
        click.echo(f"Wrote {write_csv(run_dir, csv)}")
        return
    path, notes = report(run_dir, device)
    click.echo("\n".join([f"Wrote {path}", *notes]))


@cli.command()
@click.argument("checkpoint")
@click.option(
    "--format",
    type=click.Choice(["timm", "safetensors", "huggingface", "onnx"]),
    required=True,
    help="For timm, for anything that reads safetensors, for transformers, or for ONNX runtimes.",
)
@click.option("--output", required=True, metavar="PATH", help="Where to write: a folder, or for onnx a file.onnx.")
@click.option(
    "--encoder",
    type=click.Choice(["student", "teacher"]),
    default="student",
    show_default=True,
    help="Which one of a training checkpoint.",
)
@click.option(
    "--pool", type=click.Choice(["mean", "cls"]), help="What one vector an image is.  [default: the method's]"
)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def export(checkpoint: str, output: str, format: str, debug: bool, **options: Any) -> None:
    """Write the encoder in the file CHECKPOINT for another library, and print the line that loads it there.

    \b
    python -m data2vec_vision export student_99.pt --format timm --output exported
    python -m data2vec_vision export student_99.pt --format onnx --output encoder.onnx
    """
    from data2vec_vision.export import export

    export(checkpoint, output, format, **options)


@cli.command()
@click.argument("input_path", nargs=-1, required=True)
@click.option("--json", metavar="FILE", help="Write all that was found, with all names, to this .json file.")
@click.option("--write-list", metavar="FILE", help="Write the clean list, a .txt file that `train` takes.")
@click.option("--keep-duplicates", is_flag=True, help="Keep exact copies in the list.")
@click.option("--drop-near-duplicates", is_flag=True, help="Leave out of the list what looks like another image.")
@click.option("--picture", metavar="FILE", help="Draw examples of duplicates, to judge them, to this .png file.")
@click.option("--workers", type=click.IntRange(0), help="Processes that read images.  [default: one a core]")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def scan(input_path: tuple[str, ...], debug: bool, **options: Any) -> None:
    """Look at all images of INPUT_PATH, as `train` takes it: what is unreadable or double, sizes, speed, settings.

    \b
    python -m data2vec_vision scan photos/
    python -m data2vec_vision scan photos/ --write-list clean.txt --picture duplicates.png
    """
    from data2vec_vision.scan import scan

    scan(input_path, **options)


@cli.command()
@click.argument("checkpoint")
@click.argument("input_path")
@click.option("--labels", metavar="FILE", help="A csv with the columns path and label.  [default: the class folders]")
@click.option("--test-path", metavar="DIR", help="The test images.  [default: a share of those in INPUT_PATH]")
@click.option("--test-pct", type=float, default=0.2, show_default=True, help="That share, of every class.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of everything random.")
@click.option("--k", type=click.IntRange(1), default=20, show_default=True, help="Neighbours that vote in kNN.")
@click.option("--pool", type=click.Choice(["mean", "cls"]), help="One vector an image.  [default: the method's]")
@click.option(
    "--encoder", type=click.Choice(["student", "teacher"]), default="student", show_default=True, help=ENCODER
)
@click.option("--no-floors", is_flag=True, help="Leave out the untrained encoder and raw pixels, to be quick.")
@click.option("--json", metavar="FILE", help="Where to write all figures.  [default: beside CHECKPOINT]")
@click.option("--picture", metavar="FILE", help="Where to draw the confusion matrix.  [default: beside CHECKPOINT]")
@click.option("--batch-size", type=click.IntRange(1), default=64, show_default=True, help="Images in one forward pass.")
@click.option("--workers", type=click.IntRange(0), help="Processes that read images.  [default: from the cores]")
@click.option("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps, ...  [default: the best present]")
@click.option(
    "--precision", type=click.Choice(["fp32", "bf16"]), default="fp32", show_default=True, help="Of the forward pass."
)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def evaluate(checkpoint: str, input_path: str, no_floors: bool, debug: bool, **options: Any) -> None:
    """Judge the encoder in the file CHECKPOINT by the labelled images below INPUT_PATH: what has it learned?

    \b
    python -m data2vec_vision evaluate student_99.pt photos/
    python -m data2vec_vision evaluate student_99.pt photos/ --labels labels.csv
    python -m data2vec_vision evaluate student_99.pt photos/train --test-path photos/test
    """
    from data2vec_vision.evaluate import evaluate

    evaluate(checkpoint, input_path, floors=not no_floors, **options)


@cli.command()
@click.argument("directory")
def sample(directory: str) -> None:
    """Write 2,000 small images in ten class folders to DIRECTORY, to try things on."""
    from data2vec_vision.samples import write_samples

    click.echo(write_samples(directory))


@cli.command()
@click.argument("directory", default="demo")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of everything random.")
def demo(directory: str, seed: int) -> None:
    """Train on the images that come with the package and show what was learned, in 2 minutes on 2 cores."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from data2vec_vision.demo import demo

    demo(directory, seed)


@cli.command()
@click.argument("name", required=False)
def methods(name: str | None) -> None:
    """List the methods, or explain the knobs of one."""
    from data2vec_vision.methods import explain

    click.echo(explain(name))


@cli.command()
@click.argument("pattern", default="")
def models(pattern: str) -> None:
    """List the timm models that can be pretrained, such as 'vit_small*'."""
    from data2vec_vision.vit import usable_models

    if not (found := usable_models(pattern)):
        raise InputError(f"no model that can be pretrained is named like {pattern!r}; * stands for anything: 'vit_*'")
    click.echo("\n".join(found))


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; every failure becomes one line on stderr. Returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        return cli.main(arguments, prog_name="python -m data2vec_vision", standalone_mode=False) or 0
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return 2
    except click.ClickException as error:
        return ended(" ".join(error.format_message().split()), 2)
    except InputError as error:
        return debugged(arguments) or ended(str(error), 2)
    except RunFailed as error:
        return debugged(arguments) or ended(str(error), 1)
    except Stopped as stop:
        return ended(str(stop), stop.exit_code)
    except (KeyboardInterrupt, click.Abort):
        return ended("interrupted", 130)
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        hint = "; --debug shows where" if arguments and "debug" in options_of(arguments[0]) else ""
        return debugged(arguments) or ended(f"{type(error).__name__}: {text}{hint}", 1)


def options_of(command: str) -> set[str]:
    """The names of the options and arguments of a command, none for a command that there is not."""
    return {param.name for param in cli.commands[command].params} if command in cli.commands else set()


def debugged(arguments: list[str]) -> int:
    """With --debug, print the traceback of the exception being handled. Returns 0: the line that follows counts."""
    if "--debug" in arguments:
        traceback.print_exc()
    return 0


def ended(message: str, code: int) -> int:
    """Print why the command ended, in one line. Of several processes the first that fails tells."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or speaks():
        click.echo(f"Error: {message}" if code < 128 else message, err=True)
    return code


def speaks() -> bool:
    from data2vec_vision.distributed import speaks

    return speaks()


if __name__ == "__main__":
    sys.exit(main())
