"""Mean and deviation as measured, what views do to more or fewer than three channels, and encoders for them."""

import numpy as np
import pytest
import tifffile
import timm
import torch
from PIL import Image
from timm.models import adapt_input_conv

from data2vec_vision import normalization
from data2vec_vision.arrays import ArrayPicture
from data2vec_vision.checkpoint import load, load_weights, save_encoder
from data2vec_vision.config import TrainConfig
from data2vec_vision.errors import InputError
from data2vec_vision.figures import draw_views
from data2vec_vision.looks import PlainJitter, RandomBlur
from data2vec_vision.methods.mae import MAE
from data2vec_vision.normalization import chosen, measured
from data2vec_vision.pictures import as_colours
from data2vec_vision.plan import prepare
from data2vec_vision.sources import check_channels, open_source
from data2vec_vision.transforms import ImageTransform, Views, augmentation, multi_crop
from data2vec_vision.vit import MaskedVisionTransformer, build_vit

TINY = dict(img_size=16, patch_size=4, embed_dim=32, depth=1, num_heads=2)
RNG = np.random.default_rng(0)


@pytest.fixture
def folder(tmp_path):
    """Ten images of five channels and of different sizes, the last channel constant."""
    root = tmp_path / "five"
    root.mkdir()
    for n in range(10):
        pixels = RNG.normal(n, 1 + n, (8 + n, 12, 5)).astype(np.float32)
        pixels[..., 4] = 7
        np.save(root / f"{n}.npy", pixels)
    return root


def test_mean_and_deviation_are_those_of_naive_code_each_image_weighing_the_same(folder):
    found = measured(open_source(folder), 5)
    pixels = [np.load(folder / f"{n}.npy").astype(np.float64).reshape(-1, 5) for n in range(10)]
    mean = np.mean([p.mean(axis=0) for p in pixels], axis=0)
    deviation = np.sqrt(np.mean([((p - mean) ** 2).mean(axis=0) for p in pixels], axis=0))
    deviation[4] = 1
    np.testing.assert_allclose(found.mean, mean, rtol=1e-5)
    np.testing.assert_allclose(found.std, deviation, rtol=1e-5)
    assert found.note.endswith("channel 5") and "10 images" in str(found)


def test_bytes_are_measured_in_the_unit_in_which_they_are_normalised(tmp_path):
    photos = [RNG.integers(0, 256, (9, 7, 3), np.uint8) for _ in range(3)]
    for n, photo in enumerate(photos):
        Image.fromarray(photo).save(tmp_path / f"{n}.png")
    found = measured(open_source(tmp_path), 3)
    np.testing.assert_allclose(found.mean, np.mean(photos, axis=(0, 1, 2)) / 255, rtol=1e-5)
    np.testing.assert_allclose(found.std, np.std(photos, axis=(0, 1, 2)) / 255, rtol=1e-5)
    transform = ImageTransform((9, 7), found.mean, found.std)
    seen = torch.stack([transform(Image.fromarray(photo)) for photo in photos])
    assert seen.mean().abs() < 1e-5 and (seen.square().mean() - 1).abs() < 1e-4


def test_images_are_looked_at_from_all_over_the_source_and_the_damaged_left_out(folder, monkeypatch):
    (folder / "0.npy").write_bytes(b"\x93NUMPY")
    monkeypatch.setattr(normalization, "MEASURED", 4)  # 0, 3, 6 and 9 of 10
    pixels = [np.load(folder / f"{n}.npy").astype(np.float64).reshape(-1, 5) for n in (3, 6, 9)]
    np.testing.assert_allclose(
        measured(open_source(folder), 5).mean, np.mean([p.mean(0) for p in pixels], 0), rtol=1e-5
    )
    with pytest.raises(InputError, match="none of the images looked at can be read"):
        measured(open_source(folder), 4)


def test_what_is_normalised_by(folder):
    source, weights = open_source(folder), {"mean": (0.5,) * 3, "std": (0.1,) * 3}
    assert chosen("auto", 3, weights, source).mean == (0.5,) * 3
    assert (
        chosen("imagenet", 3, weights, source).mean == chosen("auto", 3, {}, source).mean == ImageTransform((1, 1)).mean
    )
    assert chosen("auto", 5, weights, source).where_from == "measured on 10 images"
    assert chosen("imagenet", 1, {}, source).mean == (pytest.approx((0.485 + 0.456 + 0.406) / 3),)


def test_a_folder_of_other_images_is_refused_with_the_channels_that_it_has(folder):
    with pytest.raises(InputError, match=r"the images have 5 channels, such as 0\.npy; give --channels 5, not 3"):
        check_channels(open_source(folder), 3)
    (folder / "0.npy").write_bytes(b"")  # what is damaged has no channels
    with pytest.raises(InputError, match="give --channels 5, not 1"):
        check_channels(open_source(folder), 1)
    np.save(folder / "1.npy", np.zeros((8, 8)))  # one that fits, and the rest is a matter of files and not of the run
    check_channels(open_source(folder), 1)


def picture(channels, side=40):
    ramp = np.linspace(-3, 5, side * side * channels, dtype=np.float32).reshape(side, side, channels)
    made = ArrayPicture.blank(channels, side)
    made.raster._pixels = ramp
    return made, torch.from_numpy(ramp).permute(2, 0, 1)


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_views_of_any_number_of_channels_are_not_clamped_and_keep_their_range(channels):
    made, pixels = picture(channels)
    torch.manual_seed(0)
    (view,) = Views(augmentation((40, 40), (1.0, 1.0), 0.0))(made)
    assert view.dtype == torch.float32 and (view - pixels).abs().max() < 0.7  # the aspect of the crop is not one
    views = multi_crop((32, 32), 4, 3, 0.3, 0.05, flip=0.5, color_jitter=1.0, blur=1.0)
    assert views.left_out == ("saturation", "hue", "grey")
    assert [tuple(view.shape) for view in views(made)][:2] == [(channels, 32, 32)] * 2
    assert all(view.isfinite().all() and view.dtype == torch.float32 for view in views(made))
    assert max(float(view.max()) for _ in range(20) for view in views(made)) > 5.5
    assert Views(augmentation((40, 40), color_jitter=0.0)).left_out == ()


def test_jitter_scales_and_spreads_each_channel_about_its_own_mean():
    _, pixels = picture(5)
    found = []
    for seed in range(200):
        torch.manual_seed(seed)
        image = PlainJitter(0.4)(pixels)
        brightness = image.mean(dim=(1, 2)) / pixels.mean(dim=(1, 2))
        contrast = image.std(dim=(1, 2)) / pixels.std(dim=(1, 2)) / brightness
        assert brightness.std() < 1e-3 and contrast.std() < 1e-3  # the same for all channels
        found.append([brightness.mean(), contrast.mean()])
    low, high = torch.tensor(found).amin(0), torch.tensor(found).amax(0)
    assert (low > 0.599).all() and (low < 0.65).all() and (high < 1.401).all() and (high > 1.35).all()


def test_blur_of_numbers_is_that_of_a_photo():
    photo = Image.fromarray(RNG.integers(0, 256, (60, 60), np.uint8))
    blur = RandomBlur(1.5, 1.5)
    theirs = np.asarray(blur(photo), np.float32)
    ours = blur(torch.from_numpy(np.asarray(photo, np.float32))[None])[0].numpy()
    assert abs(theirs - ours)[8:-8, 8:-8].mean() < 2 < abs(np.asarray(photo, np.float32) - ours).mean()


def test_the_transform_takes_what_open_image_gives():
    made, pixels = picture(5)
    transform = ImageTransform((20, 20), (1.0,) * 5, (2.0,) * 5)
    expected = (torch.nn.functional.interpolate(pixels[None], (20, 20), mode="bilinear", antialias=True)[0] - 1) / 2
    for image in (made, pixels):
        torch.testing.assert_close(transform(image), expected, rtol=0, atol=1e-5)
    assert transform.channels == 5 and ImageTransform.from_dict(transform.to_dict()) == transform
    with pytest.raises(InputError, match=r"takes 5 channels: d2v\.open_image\(path, channels=5\)"):
        transform(Image.new("RGB", (9, 9)))
    with pytest.raises(InputError, match="takes 5 channels, not 2"):
        transform(pixels[:2])
    grey = ImageTransform((4, 4), (0.0,), (1.0,))(Image.new("RGB", (4, 4), (255, 0, 0)))
    torch.testing.assert_close(grey, torch.full((1, 4, 4), 0.299))


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_pictures_show_any_number_of_channels(channels):
    pixels = torch.stack([torch.linspace(n, n + 1 + n, 16).view(4, 4) for n in range(channels)])
    seen = as_colours(pixels)
    assert seen.shape == (3, 4, 4) and seen.dtype == torch.uint8
    for n in range(3):
        if channels == 1 or n < channels:
            assert (seen[n].min(), seen[n].max()) == (0, 255)
        else:
            assert not seen[n].any()
    assert as_colours(pixels + 100, like=pixels).min() == (0 if channels == 2 else 255)  # beyond the range of the other


def test_an_encoder_of_five_channels_comes_back_from_its_file(tmp_path):
    encoder = MaskedVisionTransformer(build_vit(in_chans=5, **TINY))
    encoder.transform = ImageTransform((16, 16), (1.0, 2.0, 3.0, 4.0, 5.0), (1.0,) * 5)
    save_encoder(encoder, tmp_path / "student.pt", "mae")
    again, image = load(tmp_path / "student.pt"), torch.randn(2, 5, 16, 16)
    assert again.transform == encoder.transform
    torch.testing.assert_close(again.embed(image), encoder.eval().embed(image))
    with pytest.raises(ValueError, match=r"expected images \[B, 5, H, W\]"):
        again(torch.randn(2, 3, 16, 16))


@pytest.mark.parametrize(("theirs", "ours"), [(3, 5), (3, 1), (5, 1), (3, 2)])
def test_the_first_convolution_of_a_file_is_adapted_as_timm_does(tmp_path, theirs, ours):
    first, vit = build_vit(in_chans=theirs, **TINY), build_vit(in_chans=ours, **TINY)
    save_encoder(MaskedVisionTransformer(first), tmp_path / "a.pt", "mae")
    start, kernel = load_weights(vit, tmp_path / "a.pt"), first.patch_embed.proj.weight
    assert start.channels == theirs
    expected = adapt_input_conv(ours, kernel) if theirs == 3 else kernel.sum(dim=1, keepdim=True)
    torch.testing.assert_close(vit.patch_embed.proj.weight, expected.detach())


def test_a_file_of_other_channels_than_three_is_refused_where_it_cannot_be_adapted(tmp_path):
    save_encoder(MaskedVisionTransformer(build_vit(in_chans=5, **TINY)), tmp_path / "a.pt", "mae")
    with pytest.raises(InputError, match=r"is for 5 channels, not 3; give --channels 5"):
        load_weights(build_vit(**TINY), tmp_path / "a.pt")


def test_pretrained_weights_are_adapted_and_the_plan_knows(tmp_path, folder, monkeypatch):
    kernel = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    torch.save(kernel.state_dict(), tmp_path / "tiny.pth")
    create, local = timm.create_model, {"file": str(tmp_path / "tiny.pth"), "custom_load": False}
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: create(*a, **k, pretrained_cfg_overlay=local))
    config = TrainConfig(str(folder), channels=5, model="vit_tiny_patch16_224", pretrained=True, method="mae",
                         checkpoint_out_dir=str(tmp_path / "run"))  # fmt: skip
    job = prepare(config)
    found, theirs = job.method.student.vit.patch_embed.proj.weight, kernel.patch_embed.proj.weight
    torch.testing.assert_close(found.detach(), adapt_input_conv(5, theirs).detach())
    assert dict(job.notes)["Weights"] == "of 3 channels; the first convolution is made one of 5 of them"
    assert "measured on 10 images" in dict(job.notes)["Channels"] and len(job.method.student.transform.mean) == 5


def test_an_encoder_from_timm_starts_with_a_transform_of_its_channels():
    assert MaskedVisionTransformer(build_vit(in_chans=5, **TINY)).transform.channels == 5
    assert MaskedVisionTransformer(build_vit(in_chans=1, **TINY)).transform.mean[0] == pytest.approx(0.449)
    assert MaskedVisionTransformer(build_vit(**TINY)).transform == ImageTransform((16, 16))


@pytest.mark.parametrize("channels", [1, 5])
def test_mae_and_its_pictures_take_any_number_of_channels(channels):
    method = MAE(build_vit(in_chans=channels, **TINY), decoder_dim=16, decoder_depth=1)
    output = method([torch.randn(4, channels, 16, 16)])
    output.loss.backward()
    assert output.extras["target"].shape[-1] == channels * 16
    assert method.eval().picture([torch.randn(channels, 30, 20)]).mode == "RGB"


def test_the_views_of_five_channels_are_drawn_and_what_is_left_out_is_said(folder, tmp_path):
    sizes = dict(image_size=16, patch_size=4, hidden_dim=32, n_heads=2, n_encoders=1)
    job = prepare(TrainConfig(str(folder), channels=5, checkpoint_out_dir=str(tmp_path / "run"), **sizes))
    from data2vec_vision.messages import describe

    assert draw_views(job).mode == "RGB"
    assert "Views    without saturation, which needs the three channels of RGB" in describe(job)
    assert "Note     constant in these images, and left as it is: channel 5" in describe(job)
    tifffile.imwrite(folder / "a.tif", np.zeros((9, 9), np.uint16))  # unreadable here, and no reason to stop
    assert prepare(TrainConfig(str(folder), channels=5, checkpoint_out_dir=str(tmp_path / "run"), **sizes)).notes
