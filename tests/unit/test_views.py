"""Views of MSN and SwAV: how much of an image they show, in which colours, how sharp, how many and how large."""

import colorsys
import pickle

import pytest
import torch
from PIL import Image, ImageChops, ImageFilter
from torchvision.transforms.functional import pil_to_tensor

from data2vec_vision.transforms import RandomBlur, Views, local_crop_count, local_crop_size, strong_augmentation

PLAIN = {"flip": 0.0, "color_jitter": 0.0, "gray": 0.0, "blur": 0.0}
WHOLE = (1.0, 1.0)


def ramps(side=256):
    """Red rises from left to right, green from top to bottom, so that a view tells which part it shows."""
    across = Image.linear_gradient("L").rotate(90)
    bands = [across, Image.linear_gradient("L"), Image.new("L", (256, 256), 90)]
    return Image.merge("RGB", bands).resize((side, side))


def draw(transform, image, count, seed=0):
    torch.manual_seed(seed)
    return [transform(image) for _ in range(count)]


def test_with_all_switched_off_a_view_is_the_resized_image():
    """No other change hides in it, such as the solarisation of later methods."""
    image = ramps(40)
    expected = pil_to_tensor(image.resize((24, 24), Image.Resampling.BICUBIC))
    for view in draw(strong_augmentation((24, 24), WHOLE, **PLAIN), image, 20):
        assert view.dtype == torch.uint8 and torch.equal(view, expected)


@pytest.mark.parametrize("crop", [(0.05, 0.3), (0.3, 1.0), (0.14, 1.0)])
def test_a_view_shows_the_share_of_the_image_asked_for(crop):
    shares = []
    for view in draw(strong_augmentation((64, 48), crop, **PLAIN), ramps(), 300):
        assert view.shape == (3, 64, 48)
        red, green = (int(c.max()) - int(c.min()) for c in view[:2].float())
        shares.append((red + 1) * (green + 1) / 256**2)
    assert crop[0] - 0.02 < min(shares) < crop[0] + 0.05
    assert crop[1] - 0.1 < max(shares) < crop[1] + 0.02


@pytest.mark.parametrize(("probability", "least", "most"), [(0.0, 0, 0), (0.5, 70, 130), (1.0, 200, 200)])
def test_mirror_images_are_as_frequent_as_asked_for(probability, least, most):
    transform = strong_augmentation((16, 16), WHOLE, **PLAIN | {"flip": probability})
    mirrored = sum(bool(view[0, 0, 0] > view[0, 0, -1]) for view in draw(transform, ramps(16), 200))
    assert least <= mirrored <= most


def test_a_fifth_of_the_views_is_grey_and_a_fifth_keeps_its_colours():
    image = ramps(16)
    gray = draw(strong_augmentation((16, 16), WHOLE, flip=0.0, color_jitter=0.0, blur=0.0), image, 400)
    assert 50 < sum(torch.equal(view[0], view[1]) for view in gray) < 115
    jitter = draw(strong_augmentation((16, 16), WHOLE, flip=0.0, gray=0.0, blur=0.0), image, 400)
    assert 50 < sum(torch.equal(view, pil_to_tensor(image)) for view in jitter) < 115


@pytest.mark.parametrize("s", [1.0, 0.5])
def test_the_jitter_has_the_strength_of_simclr(s):
    """Of a grey image it changes brightness alone, by 0.8 s; of an even colour also the hue, by 0.2 s."""
    transform = strong_augmentation((2, 2), WHOLE, **PLAIN | {"color_jitter": s})
    factors = [view.float().mean().item() / 100 for view in draw(transform, Image.new("RGB", (2, 2), (100,) * 3), 300)]
    assert 1 - 0.8 * s - 0.02 < min(factors) < 1 - 0.7 * s
    assert 1 + 0.7 * s < max(factors) < 1 + 0.8 * s + 0.02
    hues = []
    for view in draw(transform, Image.new("RGB", (2, 2), (60, 100, 100)), 300):
        hue, saturation, value = colorsys.rgb_to_hsv(*(view[:, 0, 0] / 255).tolist())
        if saturation > 0.2 and value > 0.15:  # else the hue is rounded away
            hues.append(hue - 0.5)
    assert len(hues) > 150
    assert -0.2 * s - 0.02 < min(hues) < -0.15 * s and 0.15 * s < max(hues) < 0.2 * s + 0.02


def point(side=33):
    image = Image.new("L", (side, side))
    image.putpixel((side // 2, side // 2), 255)
    return image


def peak(image):
    return image.getextrema()[1]


def test_the_blur_is_pillows_with_a_radius_between_the_two():
    image, blur = point(), RandomBlur(0.5, 2.0)
    assert (
        ImageChops.difference(RandomBlur(1.5, 1.5)(image), image.filter(ImageFilter.GaussianBlur(1.5))).getbbox()
        is None
    )
    low, high = (peak(image.filter(ImageFilter.GaussianBlur(radius))) for radius in (2.0, 0.5))
    peaks = [peak(view) for view in draw(blur, image, 100)]
    assert low <= min(peaks) < low + 3 and high - 40 < max(peaks) <= high
    assert peaks == [peak(view) for view in draw(blur, image, 100)] != [peak(v) for v in draw(blur, image, 100, seed=1)]


def test_half_of_the_views_are_blurred_by_2_pixels_at_224_and_less_on_small_images():
    image = point().convert("RGB")

    def peaks(**options):
        transform = strong_augmentation((33, 33), WHOLE, **PLAIN | options)
        return [int(view.max()) for view in draw(transform, image, 200)]

    def softest(full_size):
        return peak(image.getchannel(0).filter(ImageFilter.GaussianBlur(2.0 * full_size / 224)))

    assert 70 < sum(p < 255 for p in peaks(blur=0.5)) < 120  # the smallest radii leave a point as it is
    assert softest(224) <= min(peaks(blur=1.0)) <= softest(224) + 3
    assert softest(112) <= min(peaks(blur=1.0, full_size=112)) <= softest(112) + 3
    assert min(peaks(blur=1.0, full_size=32)) >= softest(32) > 200


@pytest.mark.parametrize(
    ("image_size", "patch_size", "crop"),
    [
        ((224, 224), 16, (96, 96)),
        ((224, 224), 14, (98, 98)),
        ((32, 32), 4, (12, 12)),
        ((16, 16), 4, (8, 8)),
        ((48, 48), 16, (32, 32)),  # two patches a side at least
        ((64, 64), 16, (32, 32)),
        ((224, 448), 16, (96, 192)),
        ((480, 224), 16, (208, 96)),
    ],
)
def test_small_crops_have_96_of_224_pixels_in_whole_patches(image_size, patch_size, crop):
    assert local_crop_size(image_size, patch_size) == crop


def test_there_are_fewer_small_crops_on_small_grids_and_none_below_4_patches():
    assert [local_crop_count((side, side), 10) for side in (28, 14, 8, 4, 3, 1)] == [10, 10, 6, 3, 0, 0]
    assert [local_crop_count((side, side), 6) for side in (28, 14, 8, 4, 3, 1)] == [6, 6, 3, 2, 0, 0]
    assert local_crop_count((14, 28), 10) == local_crop_count((28, 14), 10) == 10
    assert local_crop_count((8, 30), 10) == 6 and local_crop_count((3, 30), 10) == 0


def test_views_travel_to_workers_and_repeat_with_the_seed():
    transform = strong_augmentation((24, 16), (0.3, 1.0))
    views = Views(transform, transform, strong_augmentation((8, 8), (0.05, 0.3)))
    one, again = (draw(f, ramps(64), 2) for f in (views, pickle.loads(pickle.dumps(views))))
    assert all(torch.equal(a, b) for first, second in zip(one, again) for a, b in zip(first, second))
    assert [tuple(v.shape) for v in one[0]] == [(3, 24, 16), (3, 24, 16), (3, 8, 8)]
    assert not torch.equal(one[0][0], one[0][1]) and not torch.equal(one[0][0], one[1][0])


def test_images_keep_three_channels_in_any_shape():
    for size in ((5, 200), (200, 5), (1, 1)):
        for view in draw(strong_augmentation((16, 16), (0.05, 0.3)), Image.new("RGB", size, (9, 99, 199)), 20):
            assert view.shape == (3, 16, 16) and view.dtype == torch.uint8
