"""`evaluate` beside scikit-learn's own kNN and logistic regression on the same features.

    python benchmarks/evaluation.py CHECKPOINT TRAIN_FOLDER TEST_FOLDER

The folders hold a folder for each class. The features are those that `extract` writes. scikit-learn's kNN has the same
k, metric and weights; its logistic regression the penalty that `evaluate` chose, C = 1 / (penalty * N), and is solved to
a tolerance of 1e-6. Prints the accuracies in per cent, how many predictions differ, the seconds, and one JSON line.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import sklearn
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from data2vec_vision.evaluate import evaluate
from data2vec_vision.extract import extract
from data2vec_vision.linear import LogisticRegression as Ours
from data2vec_vision.linear import linear_probe
from data2vec_vision.probes import knn_classify


def features(checkpoint: str, folder: str, home: str) -> tuple[np.ndarray, np.ndarray]:
    """Features [N, D] and class names [N] of all images below `folder`."""
    target = Path(home, "features.npz")
    extract(checkpoint, folder, str(target))
    with np.load(target) as file:
        return file["features"], np.array([path.split("/")[0] for path in file["paths"]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("checkpoint", "train", "test"):
        parser.add_argument(name)
    parser.add_argument("--k", type=int, default=20)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        (x, y), (q, t) = (features(args.checkpoint, folder, home) for folder in (args.train, args.test))
        files = dict(json=f"{home}/e.json", picture=f"{home}/e.png")
        report = evaluate(args.checkpoint, args.train, test_path=args.test, k=args.k, floors=False, **files)
    ours = report["results"]["trained encoder"]

    clock = time.perf_counter()
    knn = KNeighborsClassifier(args.k, metric="cosine", weights=lambda d: np.exp(-d / 0.07), algorithm="brute")
    by_knn = knn.fit(x, y).predict(q)
    knn_seconds, clock = time.perf_counter() - clock, time.perf_counter()
    scaler = StandardScaler().fit(x.astype(np.float64))
    linear = LogisticRegression(C=1 / (ours["penalty"] * len(x)), tol=1e-6, max_iter=100_000)
    by_linear = linear.fit(scaler.transform(x), y).predict(scaler.transform(q))
    linear_seconds = time.perf_counter() - clock

    labels = torch.from_numpy(np.searchsorted(np.unique(y), y))
    bank, queries = torch.from_numpy(x), torch.from_numpy(q)
    clock = time.perf_counter()
    predicted = np.unique(y)[knn_classify(bank, labels, queries, args.k)[0].numpy()]
    our_knn_seconds, clock = time.perf_counter() - clock, time.perf_counter()
    straight = np.unique(y)[Ours(bank, labels).solve(ours["penalty"]).predict(queries).numpy()]
    our_linear_seconds, clock = time.perf_counter() - clock, time.perf_counter()
    linear_probe(bank, labels, seed=0)
    probe_seconds = time.perf_counter() - clock

    rows = {
        "kNN": (ours["knn"], 100 * np.mean(by_knn == t), np.sum(predicted != by_knn), our_knn_seconds, knn_seconds),
        "linear": (
            ours["linear"], 100 * np.mean(by_linear == t), np.sum(straight != by_linear), our_linear_seconds, linear_seconds
        ),
    }  # fmt: skip
    print(f"\n{len(x):,} training and {len(q):,} test images, {x.shape[1]} features, penalty {ours['penalty']:g}")
    print(
        f"{'':<8}{'evaluate':>10}{'sklearn':>10}{'difference':>12}{'other predictions':>19}{'seconds':>9}{'sklearn':>9}"
    )
    for name, (our, peer, other, seconds, peer_seconds) in rows.items():
        print(f"{name:<8}{our:>10.2f}{peer:>10.2f}{our - peer:>12.2f}{other:>19}{seconds:>9.1f}{peer_seconds:>9.1f}")
    print(f"the linear probe with its choice of the penalty: {probe_seconds:.1f} s")
    versions = {"sklearn": sklearn.__version__, **report["versions"]}
    results = {name: [round(float(value), 2) for value in row] for name, row in rows.items()}
    print(json.dumps({"checkpoint": args.checkpoint, "penalty": ours["penalty"], **results, "versions": versions}))


if __name__ == "__main__":
    main()
