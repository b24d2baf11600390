"""Processes that compute together: `forked(2, ...)` is a command, `Together(4)` 4 of them for many tests."""

import multiprocessing
import os
import pickle
import socket
import subprocess
import sys
import traceback
from pathlib import Path

import torch

from data2vec_vision.__main__ import main

SECONDS = 120  # within which a call has to answer


def work(rank, size, port, folder, pipe):
    """One process of `size`: as torchrun would start it, it calls what it is told to until the pipe is closed."""
    os.chdir(folder)
    os.environ["D2V_CACHE"] = os.path.join(folder, ".cache")
    if size > 1:
        become(rank, size, port)
    torch.set_num_threads(1)
    while True:
        try:
            function, arguments = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            answer = (True, function(*arguments))
        except BaseException:
            answer = (False, traceback.format_exc())
        pipe.send_bytes(pickle.dumps(answer))


def forked(count, *arguments):
    """The command in so many processes, as torchrun would start them, but forked from this one, without its imports."""
    port, logs, children = free_port(), [], []
    for rank in range(count):
        logs.append([Path(f"log{rank}.{name}") for name in ("out", "err")])
        if child := os.fork():
            children.append(child)
            continue
        code = 70
        try:
            become(rank, count, port)
            for number, path in enumerate(logs[-1], 1):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
            code = main([str(argument) for argument in arguments])
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    out, err = ("".join(paths[number].read_text() for paths in logs) for number in (0, 1))
    return subprocess.CompletedProcess(arguments, max(codes, key=abs), out, err)


def become(rank, count, port):
    """What torchrun tells a process."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(count)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank)}


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Together:
    """Calls a function in `size` processes; gives what each of them returns."""

    def __init__(self, size, folder):
        port = free_port()
        context = multiprocessing.get_context("forkserver")  # imports once, for all of them
        context.set_forkserver_preload(["data2vec_vision.train"])
        self.processes, self.pipes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            arguments = (rank, size, port, str(folder), theirs)
            self.processes.append(context.Process(target=work, args=arguments, daemon=True))
            self.processes[-1].start()
            theirs.close()
            self.pipes.append(ours)

    def __call__(self, function, *arguments):
        self.begin(function, *arguments)
        return self.answers()

    def begin(self, function, *arguments):
        for pipe in self.pipes:
            pipe.send_bytes(pickle.dumps((function, arguments)))

    def answers(self):
        assert all(pipe.poll(SECONDS) for pipe in self.pipes), "a process does not answer"
        found = [pickle.loads(pipe.recv_bytes()) for pipe in self.pipes]
        assert all(done for done, _ in found), "\n".join(text for done, text in found if not done)
        return [answer for _, answer in found]

    def end(self, seconds=10):
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(seconds)
            process.kill()
