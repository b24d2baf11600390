"""Patches are cut row by row, flattened like a convolution kernel, and join to the same image; and have positions."""

import math

import pytest
import torch
from torch.nn import functional as F

from data2vec_vision.errors import InputError
from data2vec_vision.patches import patchify, sincos_position, take, unpatchify
from data2vec_vision.transforms import JoinPatchSequence, PatchesToSequence, UnNormalize, ViTPatchesTransform


def naive_patches(image, P):
    _, H, W = image.shape
    return [image[:, y : y + P, x : x + P].flatten() for y in range(0, H, P) for x in range(0, W, P)]


def test_patchify_equals_slicing_on_a_grid_that_is_not_square():
    images = torch.randn(2, 3, 8, 12)
    for image, sequence in zip(images, patchify(images, 4)):
        assert torch.equal(sequence, torch.stack(naive_patches(image, 4)))


def test_patches_have_the_order_of_a_convolution_kernel():
    images, kernel = torch.randn(2, 3, 8, 12), torch.randn(5, 3, 4, 4)
    by_convolution = F.conv2d(images, kernel, stride=4).flatten(2).transpose(1, 2)
    torch.testing.assert_close(patchify(images, 4) @ kernel.flatten(1).T, by_convolution, rtol=1e-4, atol=1e-4)


def test_unpatchify_is_the_inverse():
    images = torch.randn(2, 3, 8, 12)
    assert torch.equal(unpatchify(patchify(images, 4), 4, (2, 3)), images)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="10 x 8 pixels cannot be cut into patches of 4"):
        patchify(torch.zeros(1, 3, 10, 8), 4)
    with pytest.raises(ValueError, match="do not fill a grid"):
        unpatchify(torch.zeros(1, 5, 48), 4, (2, 3))


def test_take_picks_tokens_by_index():
    tokens, index = torch.randn(2, 6, 3), torch.tensor([[5, 0], [2, 2]])
    expected = torch.stack([torch.stack([tokens[b, i] for i in row]) for b, row in enumerate(index)])
    assert torch.equal(take(tokens, index), expected)


@pytest.mark.parametrize("lead", [(), (2,), (2, 5)])
def test_the_transforms_take_one_image_or_any_batch(lead):
    image = torch.rand(*lead, 3, 8, 8)
    patches = ViTPatchesTransform(patch_size=4)(image)
    assert patches.shape == (*lead, 4, 3, 4, 4)
    sequence = PatchesToSequence()(patches)
    assert sequence.shape == (*lead, 4, 48)
    join = JoinPatchSequence(patch_size=4)
    assert torch.equal(join(patches), image) and torch.equal(join(sequence), image)


def test_join_an_image_that_is_not_square():
    image = torch.rand(3, 8, 12)
    sequence = PatchesToSequence()(ViTPatchesTransform(4)(image))
    assert torch.equal(JoinPatchSequence(4, image_size=(8, 12))(sequence), image)


def test_unnormalize_undoes_normalize():
    from torchvision.transforms.v2 import Normalize

    image, mean, std = torch.rand(2, 3, 5, 5), [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
    torch.testing.assert_close(UnNormalize(mean, std)(Normalize(mean, std)(image)), image)


@pytest.mark.parametrize(("grid", "dim"), [((14, 14), 32), ((2, 5), 8), ((5, 2), 12), ((1, 3), 4)])
def test_positions_equal_the_formula_of_mae_number_by_number(grid, dim):
    """The first half of the channels is the column's, the second the row's; sines before cosines in each."""
    position, quarter = sincos_position(grid, dim), dim // 4
    assert position.shape == (grid[0] * grid[1], dim) and position.dtype == torch.float32
    for patch, vector in enumerate(position.tolist()):
        row, column = divmod(patch, grid[1])
        expected = []
        for place in (column, row):
            for wave in (math.sin, math.cos):
                expected += [wave(place / 10000 ** (k / quarter)) for k in range(quarter)]
        assert vector == pytest.approx(expected, abs=1e-7)


def test_every_place_has_a_position_of_its_own_and_the_first_is_zero_and_one():
    position = sincos_position((14, 14), 64)
    assert torch.cdist(position, position).add(10 * torch.eye(196)).min() > 0.1
    assert position[0].tolist() == ([0.0] * 16 + [1.0] * 16) * 2


@pytest.mark.parametrize(("dim", "next_one"), [(2, 4), (6, 8), (13, 16)])
def test_positions_of_a_width_that_4_does_not_divide_are_refused(dim, next_one):
    with pytest.raises(InputError, match=f"a multiple of 4, got {dim}; use {next_one}$"):
        sincos_position((2, 2), dim)
