"""What two processes compute together is what one computes of all their rows; alone, a process does nothing."""

import multiprocessing
import os
import pickle
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from data2vec_vision import distributed
from data2vec_vision.distributed import BatchNorm
from data2vec_vision.errors import InputError
from data2vec_vision.methods.msn import MSN
from data2vec_vision.methods.swav import SwAV
from data2vec_vision.prototypes import mean_entropy_gap, prototype_use, sinkhorn
from data2vec_vision.train import clip_and_step
from data2vec_vision.vit import build_vit


def work(rank, port, pipe):
    """One of 2 processes: joins the other and calls what it is told to, until it is killed.

    As in somebody's own code, without the environment of torchrun; that is tested from the command line.
    """
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    while True:
        function, arguments = pickle.loads(pipe.recv_bytes())
        pipe.send_bytes(pickle.dumps(function(*arguments)))


@pytest.fixture(scope="module")
def two():
    """Calls a function of this file in 2 processes, started once; gives what each of them returns."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context, pipes, processes = multiprocessing.get_context("spawn"), [], []
    for rank in range(2):
        ours, theirs = context.Pipe()
        processes.append(context.Process(target=work, args=(rank, port, theirs), daemon=True))
        processes[-1].start()
        theirs.close()
        pipes.append(ours)

    def call(function, *arguments):
        for pipe in pipes:
            pipe.send_bytes(pickle.dumps((function, arguments)))
        assert all(pipe.poll(60) for pipe in pipes), "a process does not answer"
        return [pickle.loads(pipe.recv_bytes()) for pipe in pipes]

    yield call
    for process in processes:
        process.kill()


def test_processes_that_start_again_do_not_read_what_those_before_them_wrote():
    """Of torchrun's one store: with an old question in it, asked before or after the main process looks."""
    store = dist.HashStore()
    for main_first in (True, False, True):
        with ThreadPoolExecutor() as threads:
            order = [0, 1, 2] if main_first else [2, 1, 0]
            parts = []
            for number in order:
                parts.append(threads.submit(distributed.of_this_start, store, number, 3))
                time.sleep(0.05)
            first, *others = [part.result(timeout=10) for part in parts]
        assert not first.check(["address"])
        first.set("address", "here")
        assert all(other.get("address") == b"here" for other in others)


def told_by_main():
    """What the main process says in each process, and what each raises of its error."""

    def refuse():
        raise InputError(f"no, says {distributed.rank()}")

    try:
        return distributed.from_main(distributed.rank), distributed.from_main(refuse)
    except InputError as error:
        return distributed.from_main(distributed.rank), str(error)


def test_the_main_process_decides_and_its_refusal_is_everybodys(two):
    assert two(told_by_main) == [(0, "no, says 0")] * 2


def own(rows):
    """This process's half of the rows; alone, all of them."""
    return rows.chunk(distributed.processes())[distributed.rank()].clone()


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def averaged_gradients(module, loss):
    """As DistributedDataParallel gives them: means over the processes."""
    module.zero_grad()
    loss.backward()
    return [distributed.mean(p.grad.clone()) for p in module.parameters() if p.requires_grad]


def same_in_both(results, expected, **tolerance):
    for result in results:
        torch.testing.assert_close(result, expected, **(tolerance or {"rtol": 1e-10, "atol": 1e-12}))


def reductions(rows):
    values = own(rows)
    before = values.clone()
    results = [distributed.total(values), distributed.mean_with_gradient(values), distributed.logsumexp(values)]
    return [*results, distributed.gather(values)], torch.equal(values, before), distributed.mean(values)


def test_sums_means_and_gathered_rows_are_those_of_all_processes(two):
    rows = random(6, 5)
    one, other = rows.chunk(2)
    results = two(reductions, rows)
    expected = [one + other, (one + other) / 2, rows.logsumexp(dim=0, keepdim=True), rows]
    same_in_both([r for r, _, _ in results], expected)
    assert all(untouched for _, untouched, _ in results)
    same_in_both([mean for _, _, mean in results], (one + other) / 2)


def test_alone_a_process_changes_nothing():
    rows = random(6, 5)
    (total, mean, logsum, gathered), _, plain = reductions(rows)
    assert torch.equal(total, rows) and torch.equal(mean, rows) and torch.equal(plain, rows)
    assert torch.equal(gathered, rows) and torch.equal(logsum, rows.logsumexp(dim=0, keepdim=True))


def log_of_sum(rows):
    return distributed.logsumexp(own(rows))


def test_logsumexp_neither_overflows_nor_loses_the_smaller_process(two):
    rows = torch.tensor([[900.0, -900.0, 0.0], [0.0, -901.0, 1.0], [-900.0, -902.0, 2.0], [901.0, -899.0, 3.0]])
    for result in two(log_of_sum, rows):
        assert result.dtype == torch.float32 and result.shape == (1, 3)
        torch.testing.assert_close(result, rows.logsumexp(dim=0, keepdim=True))


def gather_transposed(rows):
    return distributed.gather(own(rows).transpose(0, 1))


def test_gathered_rows_keep_their_order_whatever_their_layout(two):
    rows = random(4, 3, 5)
    one, other = rows.chunk(2)
    same_in_both(two(gather_transposed, rows), torch.cat([one.transpose(0, 1), other.transpose(0, 1)]))


def gradient_through_the_mean(rows):
    values = own(rows).requires_grad_()
    distributed.mean_with_gradient(values.mean(dim=0)).pow(3).sum().backward()
    return values.grad / distributed.processes()


def test_a_gradient_flows_through_the_mean_to_every_process(two):
    rows = random(6, 4)
    torch.testing.assert_close(torch.cat(two(gradient_through_the_mean, rows)), gradient_through_the_mean(rows))
    torch.testing.assert_close(gradient_through_the_mean(rows), (rows.mean(dim=0).square() / 2).expand(6, -1))


def naive_batch_norm(norm, x):
    """Channel by channel, over all rows."""
    columns = []
    for c in range(x.shape[1]):
        column = x[:, c]
        mean = column.mean()
        variance = (column - mean).square().mean()
        columns.append((column - mean) / (variance + 1e-5).sqrt() * norm.weight[c] + norm.bias[c])
    return torch.stack(columns, dim=1)


def batch_norm(channels=5):
    norm = BatchNorm(channels).double()
    norm.weight.data, norm.bias.data = random(channels, seed=1), random(channels, seed=2)
    return norm


def normalized(rows, dtype, training):
    return batch_norm(rows.shape[1]).float().train(training)(own(rows).to(dtype))


def test_batch_norm_alone_equals_naive_code():
    norm, x = batch_norm(), 3 * random(8, 5) + 7
    torch.testing.assert_close(norm(x), naive_batch_norm(norm, x), rtol=1e-10, atol=1e-10)


def test_batch_norm_keeps_no_statistics_and_uses_the_batch_in_eval_mode_too(two):
    norm, x = batch_norm(), 3 * random(8, 5) + 7
    assert list(norm.state_dict()) == ["weight", "bias"] and list(norm.buffers()) == []
    first = norm(x)
    norm(100 * x)
    assert torch.equal(norm.eval()(x), first)
    for training in (True, False):
        out = torch.cat(two(normalized, x, torch.float32, training))
        torch.testing.assert_close(out, first.float(), rtol=1e-5, atol=1e-5)


def batch_norm_and_gradients(rows):
    """A network around a batch norm, its own loss a mean over the rows; the gradient of each row of the mean loss."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 6), batch_norm(6), nn.Tanh(), nn.Linear(6, 3)).double()
    x = own(rows).requires_grad_()
    out = net(x)
    gradients = averaged_gradients(net, out.pow(3).sum(dim=1).mean())
    return out.detach(), gradients, x.grad / distributed.processes()


def test_batch_norm_of_two_processes_is_that_of_the_whole_batch_with_its_gradients(two):
    rows = random(8, 5) * 2 + torch.arange(8).unsqueeze(1)  # the halves differ
    (out, gradients, of_rows), results = batch_norm_and_gradients(rows), two(batch_norm_and_gradients, rows)
    same_in_both([torch.cat([r[0] for r in results])], out)
    same_in_both([r[1] for r in results], gradients)
    same_in_both([torch.cat([r[2] for r in results])], of_rows)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 6), batch_norm(6)).double()
    torch.testing.assert_close(net(rows), naive_batch_norm(net[1], net[0](rows)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_batch_norm_of_half_precision_has_its_statistics_in_fp32(two, dtype):
    """Rows far from zero, whose squares overflow fp16 and whose mean bf16 cannot hold."""
    rows = (300 + 4 * random(64, 5)).to(dtype)
    exact = naive_batch_norm(batch_norm(), rows.double()).detach()
    for out in (normalized(rows, dtype, True), torch.cat(two(normalized, rows, dtype, True))):
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), exact, rtol=0.01, atol=0.01)


def balanced(scores):
    return sinkhorn(own(scores) / 0.05)


def test_sinkhorn_of_two_processes_is_that_of_all_rows(two):
    scores = torch.tanh(random(12, 7) + torch.arange(12).unsqueeze(1) / 6)  # the halves differ
    whole = balanced(scores)
    torch.testing.assert_close(torch.cat(two(balanced, scores)), whole, rtol=1e-10, atol=1e-12)
    assert not sinkhorn(scores[:6] / 0.05).allclose(whole[:6], rtol=0.1)


def gap_and_gradients(rows):
    torch.manual_seed(0)
    net = nn.Linear(5, 7).double()
    gap = mean_entropy_gap(net(own(rows)).log_softmax(dim=1))
    return gap.detach(), averaged_gradients(net, gap)


def test_the_mean_entropy_gap_and_its_gradient_are_those_of_all_rows(two):
    rows = random(8, 5) + torch.arange(8).unsqueeze(1) / 4
    same_in_both(two(gap_and_gradients, rows), gap_and_gradients(rows))
    assert gap_and_gradients(rows[:4])[0].item() != pytest.approx(gap_and_gradients(rows)[0].item(), rel=0.01)


def use(log_p, targets):
    result = prototype_use(own(targets), mean_entropy_gap(own(log_p)))
    return result | {"target_max": distributed.mean(result["target_max"])}  # the loop averages what is logged


def test_a_prototype_that_two_processes_use_is_counted_once(two):
    targets = torch.eye(6, dtype=torch.float64)[[0, 1, 2, 2, 3, 0]] * 0.7 + 0.05
    log_p = random(6, 6).log_softmax(dim=1)
    assert use(log_p, targets)["prototypes_used"] == 4
    same_in_both(two(use, log_p, targets), use(log_p, targets))


def step_of(method, views, masks):
    """A training step in parallel, as the loop takes it: outputs of the own images, gradients of all."""
    method = method.double().train()
    parallel = distributed.processes() > 1
    forward = DistributedDataParallel(method, broadcast_buffers=False) if parallel else method
    out = forward([own(v) for v in views], masks={name: own(mask) for name, mask in masks.items()})
    out.loss.backward()
    gradients = [p.grad for p in method.parameters() if p.requires_grad]
    return method, out, gradients, distributed.mean(out.loss.detach())


def vit():
    torch.manual_seed(0)
    return build_vit(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2)


HEAD = {"n_prototypes": 6, "head_dim": 24, "projection_dim": 8}


def msn_step(views, keep):
    _, out, gradients, loss = step_of(MSN(vit(), **HEAD), views, {"keep": keep})
    return out.extras["target"], gradients, loss, out.logs["entropy"]


def test_a_step_of_msn_in_two_processes_is_that_of_one(two):
    views = [random(6, 3, 16, 16, seed=s) + s for s in range(4)]  # of one size: timm resamples positions in fp32
    keep = torch.arange(14).expand(6, -1)
    one, results = msn_step(views, keep), two(msn_step, views, keep)
    torch.testing.assert_close(torch.cat([r[0] for r in results]), one[0], rtol=1e-8, atol=1e-10)
    same_in_both([r[1:] for r in results], one[1:], rtol=1e-8, atol=1e-10)


def swav_steps(views, queue_length):
    """One step that fills the queue, one that uses it."""
    method = SwAV(vit(), **HEAD, queue_length=queue_length, queue_start=0.0, freeze_prototypes=0.0)
    for _ in range(2):
        method, out, gradients, loss = step_of(method, views, {})
        method.after_step(1.0)
    return out.extras["codes"], gradients, loss, method.queue, method.queued


@pytest.mark.parametrize("queue_length", [5, 4, 0])  # shared by two processes in unlike and like parts
def test_steps_of_swav_with_its_queue_in_two_processes_are_those_of_one(two, queue_length):
    views = [random(6, 3, 16, 16, seed=s) + s for s in range(4)]
    one, results = swav_steps(views, queue_length), two(swav_steps, views, queue_length)
    torch.testing.assert_close(torch.cat([r[0] for r in results], dim=1), one[0], rtol=1e-8, atol=1e-10)
    same_in_both([r[1:] for r in results], one[1:], rtol=1e-8, atol=1e-10)
    assert one[4] == queue_length


def spoilt_step():
    """A step in which only the second process has a loss that is not a number."""
    torch.manual_seed(0)
    linear = nn.Linear(3, 2)
    parallel = DistributedDataParallel(linear)
    optimizer = torch.optim.AdamW(linear.parameters(), fused=True)
    before = linear.weight.detach().clone()
    x = torch.full((4, 3), float("nan") if distributed.rank() == 1 else 1.0)
    parallel(x).mean().backward()
    _, skipped = clip_and_step(optimizer, torch.amp.GradScaler("cpu", enabled=False), linear, 1.0)
    return skipped.item(), torch.equal(before, linear.weight)


def test_processes_skip_a_step_together(two):
    assert two(spoilt_step) == [(1.0, True), (1.0, True)]
