"""How long `python -m data2vec_vision --help` and `train --help` take, as whole processes. Prints the median and the range."""

import platform
import statistics
import subprocess
import sys
import time

ROUNDS = 15


def seconds(*arguments: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "data2vec_vision", *arguments], check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    print(f"python {platform.python_version()}, {platform.machine()}, {ROUNDS} rounds after one warm-up")
    for arguments in (("--help",), ("train", "--help")):
        seconds(*arguments)
        times = [seconds(*arguments) for _ in range(ROUNDS)]
        print(
            f"{' '.join(arguments):<14} median {statistics.median(times):.3f} s, {min(times):.3f} to {max(times):.3f} s"
        )


if __name__ == "__main__":
    main()
