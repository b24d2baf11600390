"""Processes that compute together, started once for many tests: `Together(4)` joins 4 of them by gloo."""

import multiprocessing
import os
import pickle
import socket
import traceback

import torch

SECONDS = 120  # within which a call has to answer


def work(rank, size, port, folder, pipe):
    """One process of `size`: as torchrun would start it, it calls what it is told to until the pipe is closed."""
    os.chdir(folder)
    os.environ["D2V_CACHE"] = os.path.join(folder, ".cache")
    if size > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(size)}
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
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


class Together:
    """Calls a function in `size` processes; gives what each of them returns."""

    def __init__(self, size, folder):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
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
