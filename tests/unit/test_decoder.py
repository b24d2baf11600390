"""The masked decoder against naive code: what it adds, what sees what, and that order and company do not matter."""

import copy
import math

import pytest
import torch
from torch import nn

import data2vec_vision as d2v
from data2vec_vision.decoder import MaskedVisionTransformerDecoder, decoder_width, trunc_normal, xavier
from data2vec_vision.errors import InputError

GRID = (3, 4)
S = 12


def make(n_prefix=0, grid=GRID, depth=2, **arguments):
    """A decoder in double precision whose every weight is random, norms and biases too."""
    torch.manual_seed(0)
    decoder = MaskedVisionTransformerDecoder(grid, 16, depth, 2, n_prefix, **arguments).double()
    for p in decoder.parameters():
        nn.init.normal_(p, std=0.3)
    return decoder


def places(rows, n, q, n_prefix=0, overlap=False):
    """Random tokens [R, N + n, W] at the prefix and at n patches of a row, and q others that are to be predicted."""
    torch.manual_seed(1)
    order = torch.stack([torch.randperm(S) for _ in range(rows)]) + n_prefix
    prefix = torch.arange(n_prefix).expand(rows, -1)
    index = torch.cat([prefix, order[:, :n]], dim=1)
    query = order[:, n // 2 : n // 2 + q] if overlap else order[:, n : n + q]
    return torch.randn(rows, n_prefix + n, 16, dtype=torch.float64), index, query


def naive_position(index, n_prefix):
    """Zero for a prefix token; for a patch sines and cosines of its column, then of its row, in single precision."""
    if index < n_prefix:
        return torch.zeros(16, dtype=torch.float64)
    row, column = divmod(index - n_prefix, GRID[1])
    waves = [f(x / 10000 ** (k / 4)) for x in (column, row) for f in (math.sin, math.cos) for k in range(4)]
    return torch.tensor(waves).double()


def naive_norm(x, norm):
    mean = x.mean(dim=-1, keepdim=True)
    variance = (x - mean).square().mean(dim=-1, keepdim=True)
    return (x - mean) / (variance + 1e-6).sqrt() * norm.weight + norm.bias


def naive_block(x, block):
    """A block with the norm first, two heads of 8 channels: [n, W] -> [n, W]."""
    q, k, v = (naive_norm(x, block.norm1) @ block.attn.qkv.weight.T + block.attn.qkv.bias).split(16, dim=1)
    heads = []
    for h in (slice(0, 8), slice(8, 16)):
        weights = torch.exp(q[:, h] @ k[:, h].T / math.sqrt(8))
        heads.append(weights / weights.sum(dim=1, keepdim=True) @ v[:, h])
    x = x + torch.cat(heads, dim=1) @ block.attn.proj.weight.T + block.attn.proj.bias
    hidden = naive_norm(x, block.norm2) @ block.mlp.fc1.weight.T + block.mlp.fc1.bias
    hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
    return x + hidden @ block.mlp.fc2.weight.T + block.mlp.fc2.bias


def naive_decode(decoder, tokens, index, query, n_prefix):
    """One row: tokens [n, W] at places [n], the mask token at places [q]."""
    rows = [token + naive_position(i, n_prefix) for token, i in zip(tokens, index.tolist())]
    rows += [decoder.mask_token[0, 0] + naive_position(i, n_prefix) for i in query.tolist()]
    x = torch.stack(rows)
    for block in decoder.blocks:
        x = naive_block(x, block)
    x = naive_norm(x, decoder.norm)
    return x[: len(index)], x[len(index) :]


@pytest.mark.parametrize("n_prefix", [0, 1, 5])
@pytest.mark.parametrize("overlap", [False, True])
def test_what_is_decoded_equals_naive_code(n_prefix, overlap):
    decoder = make(n_prefix)
    tokens, index, query = places(3, 4, 5, n_prefix, overlap)
    assert overlap == any(set(i.tolist()) & set(q.tolist()) for i, q in zip(index, query))
    decoded = decoder(tokens, index, query)
    for row in range(3):
        expected = naive_decode(decoder, tokens[row], index[row], query[row], n_prefix)
        torch.testing.assert_close(decoded.tokens[row], expected[0], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(decoded.queries[row], expected[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("n_prefix", [0, 1, 5])
@pytest.mark.parametrize("grid", [(3, 4), (4, 3), (1, 6)])
def test_positions_are_the_sin_cos_formula_and_zero_for_prefix_tokens(n_prefix, grid):
    position = MaskedVisionTransformerDecoder(grid, 16, 1, 2, n_prefix).position
    assert position.shape == (n_prefix + grid[0] * grid[1], 16)
    assert not position[:n_prefix].any()
    for patch, vector in enumerate(position[n_prefix:]):
        row, column = divmod(patch, grid[1])
        waves = [f(x / 10000 ** (k / 4)) for x in (column, row) for f in (math.sin, math.cos) for k in range(4)]
        assert vector.tolist() == pytest.approx(waves, abs=1e-7)


def test_another_order_of_tokens_and_queries_only_reorders():
    decoder = make(1)
    tokens, index, query = places(2, 5, 6, 1)
    decoded, p, q = decoder(tokens, index, query), torch.randperm(6), torch.randperm(6)
    reordered = decoder(tokens[:, p], index[:, p], query[:, q])
    torch.testing.assert_close(reordered.tokens, decoded.tokens[:, p], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(reordered.queries, decoded.queries[:, q], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("n_prefix", [0, 1, 5])
def test_many_rows_equal_as_many_calls(n_prefix):
    decoder = make(n_prefix)
    tokens, index, query = places(4, 5, 3, n_prefix)
    decoded = decoder(tokens, index, query)
    for row in range(4):
        one = decoder(tokens[row : row + 1], index[row : row + 1], query[row : row + 1])
        torch.testing.assert_close(one.tokens[0], decoded.tokens[row], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(one.queries[0], decoded.queries[row], rtol=1e-9, atol=1e-9)


def test_a_place_may_be_known_and_asked_for_and_asked_for_twice():
    decoder = make()
    tokens, index, _ = places(2, 4, 1)
    query = torch.cat([index[:, :1], index[:, :1]], dim=1)
    decoded = decoder(tokens, index, query)
    torch.testing.assert_close(decoded.queries[:, 0], decoded.queries[:, 1], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(decoded.queries[:, 0], decoded.tokens[:, 0], atol=1e-2)


@pytest.mark.parametrize("n_prefix", [0, 1, 5])
@pytest.mark.parametrize(("n", "q"), [(11, 1), (1, 11), (12, 0), (3, 1)])
def test_any_number_of_tokens_and_queries(n_prefix, n, q):
    decoder = make(n_prefix)
    tokens, index, query = places(2, n, q, n_prefix)
    decoded = decoder(tokens, index, query)
    assert decoded.tokens.shape == (2, n_prefix + n, 16) and decoded.queries.shape == (2, q, 16)
    assert decoded.tokens.isfinite().all() and decoded.queries.isfinite().all()


def test_without_queries_the_tokens_are_decoded_alone():
    decoder = make(1)
    tokens, index, query = places(2, 12, 0, 1)
    decoded = decoder(tokens, index)
    assert decoded.queries.shape == (2, 0, 16)
    torch.testing.assert_close(decoded.tokens, decoder(tokens, index, query).tokens, rtol=1e-9, atol=1e-9)


def test_the_gradient_reaches_all_weights_and_the_mask_token_and_the_position_has_none():
    decoder = make(1)
    tokens, index, query = places(2, 4, 5, 1)
    tokens.requires_grad_()
    decoder(tokens, index, query).queries.square().sum().backward()
    assert tokens.grad.abs().amax(dim=2).min() > 0
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in decoder.parameters())
    assert decoder.mask_token.grad is not None
    assert not decoder.position.requires_grad and decoder.position.grad is None
    assert "position" in dict(decoder.named_buffers()) and "position" not in dict(decoder.named_parameters())
    assert "position" not in decoder.state_dict()


def test_a_state_dict_makes_another_decoder_the_same():
    decoder, other = make(1), make(1)
    for p in other.parameters():
        nn.init.normal_(p)
    tokens, index, query = places(2, 4, 5, 1)
    expected = decoder(tokens, index, query)
    assert not torch.equal(other(tokens, index, query).queries, expected.queries)
    other.load_state_dict(decoder.state_dict())
    assert torch.equal(other(tokens, index, query).queries, expected.queries)
    assert torch.equal(copy.deepcopy(decoder)(tokens, index, query).queries, expected.queries)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_it_is_about_the_same(dtype):
    """Tokens come in single precision, or in half precision from a linear map under autocast."""
    decoder = make(1).float()
    for p in decoder.parameters():
        p.data.mul_(0.3)
    tokens, index, query = places(2, 4, 5, 1)
    tokens = tokens.to(dtype)
    expected = decoder(tokens.float(), index, query).queries
    with torch.autocast("cpu", torch.bfloat16):
        decoded = decoder(tokens, index, query)
    assert decoded.tokens.dtype == decoded.queries.dtype and decoded.queries.is_floating_point()
    assert (decoded.queries.float() - expected).square().mean() < 1e-3 * expected.square().mean()
    decoded.queries.float().square().sum().backward()
    assert decoder.mask_token.grad.isfinite().all() and decoder.mask_token.grad.dtype == torch.float32


@pytest.mark.parametrize("n_prefix", [0, 1, 5])
@pytest.mark.parametrize("by", ["query", "mask"])
def test_a_token_for_every_place_gives_the_same_as_tokens_and_queries(n_prefix, by):
    decoder = make(n_prefix)
    tokens, index, query = places(2, 4, 8, n_prefix)
    canvas = torch.randn(2, n_prefix + S, 16, dtype=torch.float64)
    canvas = canvas.scatter(1, index.unsqueeze(-1).expand_as(tokens), tokens)
    mask = torch.zeros(2, n_prefix + S, dtype=torch.bool).scatter(1, query, True)
    full = decoder.forward_full(canvas, **({"query": query} if by == "query" else {"mask": mask}))
    assert full.shape == canvas.shape
    expected = decoder(tokens, index, query)
    for row in range(2):
        torch.testing.assert_close(full[row, index[row]], expected.tokens[row], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(full[row, query[row]], expected.queries[row], rtol=1e-9, atol=1e-9)


def test_of_a_token_for_every_place_only_some_can_be_decoded():
    decoder = make(1)
    tokens, index, query = places(2, 4, 3, 1)  # five patches are neither known nor asked for
    canvas = torch.randn(2, 1 + S, 16, dtype=torch.float64)
    canvas = canvas.scatter(1, index.unsqueeze(-1).expand_as(tokens), tokens)
    some = decoder.forward_full(canvas, query=query, keep=torch.cat([index, query], dim=1))
    expected = decoder(tokens, index, query)
    torch.testing.assert_close(some, torch.cat(expected, dim=1), rtol=1e-9, atol=1e-9)
    alone = decoder.forward_full(canvas, keep=index)
    torch.testing.assert_close(alone, decoder(tokens, index).tokens, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("junk", [float("nan"), float("inf")])
def test_what_stands_at_a_masked_place_does_not_leak(junk):
    decoder = make(1)
    canvas, (_, _, query) = torch.randn(2, 1 + S, 16, dtype=torch.float64), places(2, 4, 8, 1)
    spoilt = canvas.scatter(1, query.unsqueeze(-1).expand(-1, -1, 16), junk).requires_grad_()
    full = decoder.forward_full(spoilt, query=query)
    assert torch.equal(full, decoder.forward_full(canvas, query=query))
    full.square().sum().backward()
    assert spoilt.grad.isfinite().all() and all(p.grad.isfinite().all() for p in decoder.parameters())


def test_both_mask_and_query_are_refused():
    with pytest.raises(ValueError, match="give mask or query, not both"):
        make().forward_full(torch.zeros(1, S, 16), torch.zeros(1, S, dtype=torch.bool), torch.zeros(1, 1, dtype=int))


def test_drop_path_rises_linearly_over_the_blocks():
    def rates(depth, drop_path):
        blocks = make(depth=depth, drop_path=drop_path).blocks
        return [[getattr(m, "drop_prob", 0.0) for m in (block.drop_path1, block.drop_path2)] for block in blocks]

    assert rates(5, 0.2) == [[pytest.approx(r)] * 2 for r in (0.0, 0.05, 0.1, 0.15, 0.2)]
    assert rates(3, 0.0) == [[0.0, 0.0]] * 3


def test_drop_path_makes_noise_in_training_only():
    decoder, (tokens, index, query) = make(drop_path=0.5), places(8, 4, 5)
    assert not torch.equal(*(decoder(tokens, index, query).queries for _ in range(2)))
    decoder.eval()
    assert torch.equal(*(decoder(tokens, index, query).queries for _ in range(2)))


@pytest.mark.parametrize("init", ["xavier", "trunc_normal"])
def test_first_weights_are_the_methods(init):
    """Xavier: uniform up to sqrt(6 / (in + out)), so of deviation sqrt(2 / (in + out)); or normal of deviation 0.02."""
    torch.manual_seed(0)
    decoder = MaskedVisionTransformerDecoder((4, 4), 64, 3, 2, init=init)
    for module in decoder.modules():
        if isinstance(module, nn.Linear):
            deviation = math.sqrt(2 / sum(module.weight.shape)) if init == "xavier" else 0.02
            assert module.weight.std().item() == pytest.approx(deviation, rel=0.05)
            if init == "xavier":
                assert module.weight.abs().max() <= deviation * math.sqrt(3)
            else:
                assert module.weight.abs().max() > 3 * deviation
            assert not module.bias.any()
        elif isinstance(module, nn.LayerNorm):
            assert torch.equal(module.weight, torch.ones(64)) and not module.bias.any() and module.eps == 1e-6
    assert decoder.mask_token.shape == (1, 1, 64) and decoder.mask_token.all()
    assert decoder.mask_token.std().item() == pytest.approx(0.02, rel=0.4)


def test_linear_maps_without_bias_can_be_initialised_too():
    for init, deviation in ((xavier, math.sqrt(2 / 128)), (trunc_normal, 0.02)):
        linear = nn.Linear(64, 64, bias=False)
        init(linear)
        assert linear.weight.std().item() == pytest.approx(deviation, rel=0.05)


@pytest.mark.parametrize(("dim", "heads", "unit"), [(18, 2, 4), (16, 3, 12), (6, 1, 4), (12, 8, 8)])
def test_widths_that_heads_or_positions_do_not_divide_are_refused(dim, heads, unit):
    with pytest.raises(InputError, match=f"width {dim} cannot have {heads} head.*use a multiple of {unit}$"):
        MaskedVisionTransformerDecoder(GRID, dim, 1, heads)


def test_the_width_of_a_decoder_is_the_nearest_that_its_heads_and_positions_divide():
    assert [decoder_width(1 / 2, *encoder) for encoder in ((768, 12), (384, 6), (192, 3))] == [384, 192, 96]
    for width in range(16, 200, 8):
        for heads in range(1, 9):
            ours = decoder_width(1 / 2, width, heads)
            fitting = [w for w in range(4, 400, 4) if w % heads == 0]
            assert ours in fitting
            assert abs(ours - width / 2) == min(abs(w - width / 2) for w in fitting)


def test_it_is_public():
    assert d2v.MaskedVisionTransformerDecoder is MaskedVisionTransformerDecoder
