"""What stops a run of ViT-B/16 on many GPUs first: on paper, from formulas and from what was measured elsewhere.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --peak-tflops 312 --cores-per-gpu 12 --machine-link-gbit 100

Nothing here was run on a GPU. A GPU's rate is the datasheet's peak times a utilisation, both assumed; FLOP an image and bytes a step
are those of formulas.py, which a test holds against torch's counter and real collectives; images that a core decodes, bytes of an index and
seconds to open one are the figures of RESULTS.md, of machine A. For every method and number of GPUs the demand at the GPUs' own rate is divided by what
there is of each resource; the largest quotient above one is the bottleneck, and the rate is divided by it. Resources work beside each other: decoding
beside training, the all-reduce beside the backward pass (a ring through all GPUs crosses a machine's link once each way), the host's
flags beside the GPU. Each method has its defaults, and all the same images a step.
"""

import argparse
from dataclasses import dataclass

import torch
from formulas import Flops, Sent, a_step, flops, sent_by_ring

from data2vec_vision import methods

MODEL = "vit_base_patch16_224"
NVLINK = 450e9  # bytes/s each way, of an H100's datasheet
# Measured, machine A. Images/s of a core, from files of 108 kB to all views ("From files to views"); data2vec 2.0, MAE and I-JEPA
# take one crop, with or without a flip.
DECODED = {"data2vec": 372, "data2vec2": 508, "ijepa": 550, "mae": 508, "msn": 52, "swav": 68}
# Bytes a name and microseconds a name, of ten million ("Where images come from"): kept, at the peak while opening, time to open.
INDEXES = {"folder, 21 bytes a name": (33.0, 59.8, 5.5), "sub-folders, 34 bytes a name": (41.6, 41.6, 3.0),
           "sorted list, 29 bytes a name": (36.3, 36.3, 2.0), "1,000 tars, opened again": (105, 105, 0.28),
    "one tar, opened again": (53, 53, 0.07)}  # fmt: skip
ORDER = 2 * 8  # bytes an image, of two epochs' orders
ORDER_SECONDS = 0.05e-6  # an image, to draw one
REMEDIES = {
    "decoding": "{cores:.0f} cores and as many --workers a GPU; images resized beforehand; fewer crops",
    "disk": "images resized beforehand, in tar shards on local disks",
    "network": "more images a step: --batch-size, --grad-accum; a faster link",
    "flags": "more images a step: --batch-size, --grad-accum",
    "statistics": "more images a step",
    "none": "",
}


@dataclass(frozen=True)
class Cluster:
    """What is assumed of the machines."""

    peak_tflops: float
    utilisation: float
    gpus_a_machine: int
    cores_per_gpu: float
    machine_link_gbit: float  # out of a machine, each way
    disk_gb_s: float  # of a machine
    image_kb: float
    hop_us: float  # of a small message between two hosts, on which gloo's flags go round
    nccl_us: float  # of a small collective between GPUs

    @property
    def rate(self) -> float:
        return self.peak_tflops * 1e12 * self.utilisation


@dataclass
class Case:
    """A method on so many GPUs: what it demands, as a share of what there is."""

    step: float  # seconds, of the GPUs alone
    shares: dict[str, float]
    images_a_second: float  # of all GPUs, behind the bottleneck

    @property
    def bottleneck(self) -> str:
        name = max(self.shares, key=self.shares.__getitem__)
        return name if self.shares[name] > 1 else "none"


def case(name: str, of: Flops, sent: dict[str, Sent], gpus: int, images_a_step: int, cluster: Cluster) -> Case:
    """`sent` are the collectives of a step."""
    rate = cluster.rate / of.total  # images/s of a GPU
    each = images_a_step / gpus
    step = each / rate
    link = NVLINK if gpus <= cluster.gpus_a_machine else min(NVLINK, cluster.machine_link_gbit / 8 * 1e9)
    flags = 2 * (gpus - 1) * cluster.hop_us * 1e-6  # gloo's ring goes round twice, to sum and to tell
    statistics = sum(part.calls for what, part in sent.items() if what not in ("gradients", "flags"))
    shares = {
        "decoding": rate / DECODED[name] / cluster.cores_per_gpu,
        "disk": rate * min(gpus, cluster.gpus_a_machine) * cluster.image_kb * 1e3 / (cluster.disk_gb_s * 1e9),
        "network": sent_by_ring(sent["gradients"].bytes, gpus) / link / (step * of.backward / of.total),
        "flags": flags / step,
        "statistics": statistics * cluster.nccl_us * 1e-6 / step,
    }
    return Case(step, shares, gpus * rate / max(1.0, *shares.values()))


def tables(args: argparse.Namespace, cluster: Cluster) -> None:
    kinds = {name: methods.find(name)(MODEL) for name in methods.names()}
    work = {name: flops(method) for name, method in kinds.items()}
    print("| method | GFLOP an image: forward | backward | images/s of a GPU | cores to decode for it | disk, MB/s |")
    print("|---|---|---|---|---|---|")
    for name, of in work.items():
        rate = cluster.rate / of.total
        print(f"| {name} | {of.forward / 1e9:,.0f} | {of.backward / 1e9:,.0f} | {rate:,.0f} | {rate / DECODED[name]:.1f} | "
              f"{rate * cluster.image_kb / 1e3:,.0f} |")  # fmt: skip
    print("\n| method | GPUs | images a GPU and step | step, ms | decoding | disk | network | flags | statistics | bottleneck | images/s | "
          "h an epoch of 10 million | of a billion | what helps |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|---|---|---|---|---|")
    for name, method in kinds.items():
        for gpus in args.gpus:
            sent = a_step(method, args.images_a_step, 1, gpus, 10, 8)
            found = case(name, work[name], sent, gpus, args.images_a_step, cluster)
            hours = [count / found.images_a_second / 3600 for count in (1e7, 1e9)]
            remedy = REMEDIES[found.bottleneck].format(cores=cluster.rate / work[name].total / DECODED[name])
            shares = " | ".join(f"{share:.2f}" for share in found.shares.values())
            print(f"| {name} | {gpus} | {args.images_a_step / gpus:g} | {1e3 * found.step:.1f} | {shares} | {found.bottleneck} | "
                  f"{found.images_a_second:,.0f} | {hours[0]:.2f} | {hours[1]:.1f} | {remedy} |")  # fmt: skip
    print(f"\nBefore the first step; {cluster.gpus_a_machine} processes a machine have an index each\n")
    print(
        "| images | as | index and orders of a process, GB | of a machine | at the peak | to open, min | an order, s | files, TB |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for count in (1e7, 1e9):
        for what, (kept, peak, seconds) in INDEXES.items():
            process = count * (kept + ORDER)
            most = cluster.gpus_a_machine * max(process, count * peak)
            print(f"| {count:,.0f} | {what} | {process / 1e9:.1f} | {cluster.gpus_a_machine * process / 1e9:,.0f} GB | "
                  f"{most / 1e9:,.0f} GB | {count * seconds / 6e7:.1f} | {count * ORDER_SECONDS:.1f} | "
                  f"{count * cluster.image_kb / 1e9:,.1f} |")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--images-a-step", type=int, default=4096)
    parser.add_argument("--peak-tflops", type=float, default=989, help="of an H100 in bf16, dense, by its datasheet")
    parser.add_argument("--utilisation", type=float, default=0.4, help="of the peak that a step reaches; assumed")
    parser.add_argument("--gpus-a-machine", type=int, default=8)
    parser.add_argument("--cores-per-gpu", type=float, default=16)
    parser.add_argument("--machine-link-gbit", type=float, default=400, help="of a machine to others, each way")
    parser.add_argument("--disk-gb-s", type=float, default=5, help="of a machine: a local NVMe disk or two")
    parser.add_argument("--image-kb", type=float, default=108, help="of a file; those that were decoded had 108")
    parser.add_argument("--hop-us", type=float, default=20, help="of a small message between two hosts")
    parser.add_argument("--nccl-us", type=float, default=50, help="of a small collective of all GPUs")
    args = parser.parse_args()
    named = {name: getattr(args, name) for name in Cluster.__dataclass_fields__}
    print("Assumed: " + ", ".join(f"{name} {value:g}" for name, value in named.items()) +
          f", images a step {args.images_a_step}, NVLink {NVLINK / 1e9:g} GB/s; {MODEL}, torch {torch.__version__}\n")  # fmt: skip
    tables(args, Cluster(**named))


if __name__ == "__main__":
    main()
