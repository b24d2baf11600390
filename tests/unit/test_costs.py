"""benchmarks/formulas.py against what torch counts: FLOP of a pass, and what two processes send to each other."""

import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"
sys.path.append(str(BENCHMARKS))

from flops import CONVOLUTION  # noqa: E402
from formulas import Sent, flops, sent_by_ring  # noqa: E402
from traffic import counted, counted_configs  # noqa: E402

from data2vec_vision import methods  # noqa: E402
from data2vec_vision.device import set_fused_attention  # noqa: E402
from data2vec_vision.transforms import local_crop_size  # noqa: E402
from data2vec_vision.vit import build_vit  # noqa: E402

SIDE, PATCH, BATCH = 64, 8, 2
CASES = [
    ("data2vec", {}),
    ("data2vec2", {"decoder_dim": 32, "n_masks": 3}),
    ("ijepa", {"targets": "blocks"}),
    ("ijepa", {}),
    ("mae", {"decoder_depth": 3}),
    ("msn", {"n_focal": 3}),
    ("msn", {"n_focal": 0}),
    ("swav", {"n_local": 4}),
]


def flop_of(function):
    """What torch counts, an image, and what the function gives."""
    with FlopCounterMode(display=False, custom_mapping=CONVOLUTION) as counter:
        result = function()
    return counter.get_total_flops() / BATCH, result


@pytest.mark.parametrize(("name", "knobs"), CASES)
def test_flop_of_a_pass_are_those_that_torch_counts(name, knobs):
    kind = methods.find(name)
    vit = build_vit(img_size=SIDE, patch_size=PATCH, embed_dim=48, depth=3, num_heads=3, **kind.encoder_arguments())
    method = kind(vit, **knobs).train()
    set_fused_attention(method, False)  # the fused one computes its products again in the backward pass
    large, small = {"msn": (2, knobs.get("n_focal", 0)), "swav": (2, knobs.get("n_local", 0))}.get(name, (1, 0))
    height, width = local_crop_size((SIDE, SIDE), PATCH)
    views = [torch.randn(BATCH, 3, SIDE, SIDE) for _ in range(large)]
    views += [torch.randn(BATCH, 3, height, width) for _ in range(small)]
    forward, output = flop_of(lambda: method(views))
    backward, _ = flop_of(output.loss.backward)
    formula = flops(method, output.extras["query"].shape[-1] if name == "ijepa" else None)
    assert (formula.forward, formula.backward) == (forward, backward)


def test_two_processes_send_what_the_formula_says(tmp_path):
    """Calls and bytes of every purpose, for each method; nothing is sent that the formula does not know of."""
    names = methods.names()
    for name, (sent, formula) in zip(names, counted(counted_configs(tmp_path, names)), strict=True):
        assert sent.keys() == formula.keys(), name
        assert sent.pop("gradients").bytes == formula.pop("gradients").bytes, name  # in as many buckets as DDP likes
        assert {what: tuple(s) for what, s in sent.items()} == {
            what: pytest.approx(tuple(s)) for what, s in formula.items()
        }, name


def test_what_a_ring_sends():
    """Of n processes each sends n - 1 of n parts, twice for a sum that all get."""
    assert sent_by_ring(800, 1) == 0
    assert sent_by_ring(800, 4) == 2 * 3 * 200
    assert sent_by_ring(800, 4, gathered=True) == 3 * 200
    assert Sent(2, 10) * 3 == Sent(6, 30)
