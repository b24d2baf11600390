"""Two steps of data2vec with weights, gradients, moments and teacher sharded by torch's fully_shard, beside the same steps whole.

    python benchmarks/fully_shard.py

An experiment with 2 processes over gloo on the CPU, in float64: `train` does not shard. Student and teacher are cut alike, so that the
teacher's average is taken shard by shard, and nothing is sent for it. The units that are gathered one after the other are the
attentions and feed-forward networks of the blocks; `encode` calls these, and not always the block as a whole. All else belongs to the
outermost unit, the method. Printed are what a process keeps, the bytes that its collectives got, and how far the weights are from the unsharded ones.
"""

import copy
import multiprocessing
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
from data2vec_vision.vit import build_vit

STEPS, IMAGES, RATE, CLIP = 2, 8, 1e-3, 0.5
PROCESSES = 2


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


@torch.no_grad()
def ema_of_shards(teacher: nn.Module, student: nn.Module, tau: float) -> None:
    """ema_update, on what this process has of both."""
    ours, theirs = ([local(p) for p in module.parameters()] for module in (teacher, student))
    torch._foreach_lerp_(ours, theirs, 1 - tau)


def take_steps(method: Data2Vec, images: Tensor, masks: dict[str, Tensor]) -> tuple[list[float], dict[str, int]]:
    """Gradient norms of the steps, and the collectives of the last one with their number."""
    optimizer = torch.optim.AdamW(method.param_groups(0.05), lr=RATE, fused=True)
    norms = []
    for step in range(STEPS):
        with CommDebugMode() as collectives:
            method(images, masks=masks).loss.backward()
            norm = nn.utils.clip_grad_norm_(method.parameters(), CLIP)
            norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
            optimizer.step()
            optimizer.zero_grad()
            ema_of_shards(method.teacher, method.student, 0.9)
            method.position_mean.after_step()
        norms.append(norm.item())
    return norms, {str(op): n for op, n in collectives.get_comm_counts().items()}


def kept(method: nn.Module) -> int:
    """Bytes of the parameters in this process."""
    return sum(local(p).nbytes for p in method.parameters())


def work(rank: int, port: int) -> str:
    """What process `rank` finds."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=PROCESSES)
    torch.manual_seed(0)
    vit = build_vit(img_size=32, patch_size=8, embed_dim=64, depth=4, num_heads=4)
    whole = Data2Vec(vit, tau_initial=0.9, tau_end=0.9).double().train()
    images, masks = torch.randn(IMAGES, 3, 32, 32).double(), whole.sample_masks(IMAGES, torch.device("cpu"))
    sharded = copy.deepcopy(whole)
    shard(sharded)
    share = slice(rank * IMAGES // PROCESSES, (rank + 1) * IMAGES // PROCESSES)
    start = {name: tensor.clone() for name, tensor in whole.state_dict().items() if tensor.is_floating_point()}
    norms, _ = take_steps(whole, images, masks)
    norms_of_shards, collectives = take_steps(sharded, images[share], {name: mask[share] for name, mask in masks.items()})
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
        lines.append(f"after {STEPS} steps a weight has moved by {moved:.1e} at most, and is {apart:.1e} from its unsharded one at most")
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
