"""The three ways a run can end early; the command line turns each into one line and an exit code."""


class InputError(ValueError):
    """What the user gave cannot be used (exit code 2). The message says what to do instead."""


class RunFailed(RuntimeError):
    """The run could not go on: disk, memory, numbers (exit code 1). Nothing saved is lost."""


class Stopped(Exception):
    """A signal ended the run after a checkpoint (exit code 128 + the signal's number)."""

    def __init__(self, signal_number: int, message: str):
        super().__init__(message)
        self.exit_code = 128 + signal_number


def one_line(error: BaseException) -> str:
    """`error` as a short text on one line, with its type where the text alone says little."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300] if text else type(error).__name__
