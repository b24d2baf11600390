"""README's job script, with stand-ins for SLURM's commands: it is requeued, goes on, and makes the run of one job."""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch
from conftest import TINY, same_state

README = Path(__file__).resolve().parent.parent.parent / "README.md"
STAND_INS = {
    "sbatch": 'exec bash "$1"',  # signals go to the batch script alone, as with --signal=B:
    "srun": 'exec "$@"',  # one task on one machine, to which it hands its signals on
    "scontrol": '[ "$1" = requeue ] && echo "$2" >> requeued || echo localhost',
}
# Slow until the job has been requeued, so that the signal comes in time.
SLOW = """
import os, time
from data2vec_vision.methods.data2vec import Data2Vec
class Slow(Data2Vec):
    def training_step(self, views, masks):
        self.calls = getattr(self, "calls", 0) + 1
        time.sleep(0 if os.path.exists("requeued") or self.calls < 4 else 0.5)
        return super().training_step(views, masks)
"""


def is_free(port):
    """Whether nothing listens on the port, which the script makes of the job's number."""
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) != 0


def lines(folder):
    path = Path(folder) / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def test_the_job_script_requeues_itself_and_makes_the_run_of_one_job(cli, images):
    Path("bin").mkdir()
    for name, line in STAND_INS.items():
        (Path("bin") / name).write_text(f"#!/bin/bash\n{line}\n")
        (Path("bin") / name).chmod(0o755)
    Path("slow.py").write_text(SLOW)
    (script,) = re.findall(r"```bash\n(#!/bin/bash\n#SBATCH.*?)```", README.read_text(), re.DOTALL)
    options = [images, *TINY, "--epochs", 4, "--method", "slow.py", "--checkpoint-out-dir"]
    assert script.count("train photos/ ") == 1
    Path("job.sh").write_text(script.replace("photos/", shlex.join(map(str, [*options, "job"]))))
    number = str(next(n for n in range(os.getpid() % 9000, 10_000) if is_free(20_000 + n)))
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(Path("bin").resolve()), str(Path(sys.executable).parent), os.environ["PATH"]]),
        **{"SLURM_JOB_ID": number, "SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "1", "SLURM_JOB_NODELIST": "node[1]"},
        "OMP_NUM_THREADS": "1",
    }
    log = open("log", "a")
    job = subprocess.Popen(["sbatch", "job.sh"], env=environment, stdout=log, stderr=log)
    deadline = time.monotonic() + 300
    while job.poll() is None and time.monotonic() < deadline and lines("job") < 4:
        time.sleep(0.05)
    os.kill(job.pid, signal.SIGUSR1)
    assert job.wait(300) == 0, Path("log").read_text()
    assert Path("requeued").read_text() == f"{number}\n"
    step = torch.load("job/checkpoint_last.pt", weights_only=True)["step"]
    assert 4 <= step < 24 and f"Stopped after step {step};" in Path("log").read_text()
    assert subprocess.run(["sbatch", "job.sh"], env=environment, stdout=log, stderr=log, timeout=300).returncode == 0
    assert f"of step {step}; the run goes on from there" in Path("log").read_text()
    assert Path("requeued").read_text() == f"{number}\n"
    assert cli("train", *options, "whole")[0] == 0
    assert same_state("whole/checkpoint_3.pt", "job/checkpoint_3.pt")
    ours, theirs = (
        torch.load(f"{folder}/student_3.pt", weights_only=True)["state_dict"] for folder in ("whole", "job")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
