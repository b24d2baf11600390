"""Patches are cut row by row, flattened like a convolution kernel, and join to the same image."""

import pytest
import torch
from torch.nn import functional as F

from data2vec_vision.patches import patchify, take, unpatchify
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
