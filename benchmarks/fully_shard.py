"""Two steps of data2vec with weights, gradients, moments and teacher sharded by torch's fully_shard, beside the same steps whole.

    python benchmarks/fully_shard.py

An experiment with 2 processes over gloo on the CPU, in float64: `train` does not shard, but its clipping, its optimizer step, which leaves out
a gradient that is not finite, and its EMA are taken as they are. Student and teacher are cut alike, so that the teacher's average is
taken shard by shard and nothing is sent for it. The units that are gathered one after the other are the
attentions and feed-forward networks of the blocks; `encode` calls these, and not always the block as a whole. All else belongs to the
outermost unit, the method. Printed are what a process keeps, how many collectives a step takes, and how far the weights are from the unsharded ones.
"""

import copy
import math
import multiprocessing
import warnings
from concurrent.futures import ProcessPoolExecutor

import torch
import torch.distributed as dist
from processes import free_port
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from data2vec_vision.methods.data2vec import Data2Vec
from data2vec_vision.train import clip_and_step
from data2vec_vision.vit import build_vit

STEPS, IMAGES, RATE, CLIP = 2, 8, 1e-3, 0.5
PROCESSES, TOLERANCE = 2, 1e-12


def shard(method: Data2Vec) -> None:
    """Cut all parameters, student's and teacher's alike, over the processes."""
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for encoder in method.encoders.values():
        for block in encoder.vit.blocks:
            fully_shard(block.attn, mesh=mesh)
            fully_shard(block.mlp, mesh=mesh)
    fully_shard(method, mesh=mesh)


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def take_steps(method: Data2Vec, images: Tensor, masks: dict[str, Tensor]) -> tuple[list[float], str]:
    """`train`'s clipping, optimizer step and EMA. Gives the gradient norms, and the collectives of the last step."""
    optimizer = torch.optim.AdamW(method.param_groups(0.05), lr=RATE, fused=True)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    norms = []
    for _ in range(STEPS):
        with CommDebugMode() as of_step:
            method(images, masks=masks).loss.backward()
            norm, _ = clip_and_step(optimizer, scaler, method, CLIP)
        with CommDebugMode() as of_teacher:
            method.after_step(0.5)
        norms.append((norm.full_tensor() if isinstance(norm, DTensor) else norm).item())
    before = [local(p).clone() for p in method.parameters()]
    method(images * math.nan, masks=masks).loss.backward()
    clip_and_step(optimizer, scaler, method, CLIP)
    if not all(torch.equal(old, local(new)) for old, new in zip(before, method.parameters())):
        raise RuntimeError("a step whose gradient is not finite has changed the weights")
    counts = [{str(op).rpartition(".")[2]: n for op, n in of.get_comm_counts().items()} for of in (of_step, of_teacher)]
    return norms, f"forward, backward and clipping {counts[0]}; teacher and centre of the targets {counts[1]}"


def kept(method: nn.Module) -> int:
    """Bytes of the parameters in this process."""
    return sum(local(p).nbytes for p in method.parameters())


def work(rank: int, port: int) -> str:
    """What process `rank` finds."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # of views; nothing here writes into them
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=PROCESSES)
    torch.manual_seed(0)
    vit = build_vit(img_size=32, patch_size=8, embed_dim=64, depth=4, num_heads=4)
    whole = Data2Vec(vit, tau_initial=0.9, tau_end=0.9).double().train()
    images, masks = torch.randn(IMAGES, 3, 32, 32).double(), whole.sample_masks(IMAGES, torch.device("cpu"))
    sharded = copy.deepcopy(whole)
    shard(sharded)
    share = slice(rank * IMAGES // PROCESSES, (rank + 1) * IMAGES // PROCESSES)
    start = {name: p.detach().clone() for name, p in whole.named_parameters()}
    norms, _ = take_steps(whole, images, masks)
    norms_of_shards, collectives = take_steps(
        sharded, images[share], {name: mask[share] for name, mask in masks.items()}
    )
    full = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True))
    lines = [
        f"parameters of student and teacher, kB: {kept(whole) / 1e3:.1f} whole, {kept(sharded) / 1e3:.1f} here",
        f"gradient norms: {norms} whole, {norms_of_shards} sharded",
        f"collectives of a step: {collectives}",
    ]
    if rank == 0:  # the others get nothing
        final = whole.state_dict()
        moved = max((final[name] - tensor).abs().max().item() for name, tensor in start.items())
        apart = max((full[name] - final[name]).abs().max().item() for name in start)
        if apart > TOLERANCE:
            raise RuntimeError(f"the sharded weights are {apart:.1e} from the whole ones")
        lines.append(
            f"after {STEPS} steps a weight has moved by {moved:.1e} at most, and is {apart:.1e} from its unsharded one at most"
        )
    dist.destroy_process_group()
    return "\n".join(lines)


def main() -> None:
    port = free_port()
    with ProcessPoolExecutor(PROCESSES, multiprocessing.get_context("spawn")) as pool:
        first, *others = [pool.submit(work, rank, port) for rank in range(PROCESSES)]
        print(f"torch {torch.__version__}, {PROCESSES} processes, gloo, float64\n{first.result()}")
        for other in others:
            other.result()


if __name__ == "__main__":
    main()
