"""Corruptions: valid images of any size, the published strengths, and the same bits in every batch."""

from __future__ import annotations

import io
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_robust.data import DataSpec, eval_loader, load_data
from sparse_robust.errors import UsageError
from sparse_robust.evaluation.corruptions import CORRUPTIONS, SEVERITIES, corrupt, corruption_accuracy
from sparse_robust.evaluation.corruptions.levels import LEVELS, SIDES, levels_for

TABLES = list(SIDES)

# Those whose published strengths grow with the severity. Glass blur, the elastic transform and frost trade one
# parameter for another on the way.
GROWING = sorted(set(CORRUPTIONS) - {"glass_blur", "elastic_transform", "frost"})

GEOMETRIC = ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "elastic_transform", "pixelate")


def smooth_images(count: int, channels: int, height: int, width: int) -> Tensor:
    """Images with structure at several scales, in [0, 1]."""
    generator = torch.Generator().manual_seed(count + channels + height)
    x = torch.zeros(count, channels, height, width)
    for cells, strength in ((2, 0.5), (5, 0.3), (12, 0.2)):
        noise = torch.rand(count, channels, cells, cells, generator=generator)
        x += strength * F.interpolate(noise, (height, width), mode="bilinear")
    return x


@pytest.fixture(scope="module")
def fashion() -> Tensor:
    split = load_data(DataSpec(name="fashion-mnist-source")).test
    return torch.cat([batch.x for batch in eval_loader(split, 60, limit=60)])


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 9, 17), (3, 64, 33), (5, 12, 12), (1, 28, 28)], ids=str)
def test_any_size_and_any_number_of_channels_give_valid_images(name: str, shape: tuple[int, ...]) -> None:
    x = smooth_images(2, *shape)
    for table, severity in itertools.product(TABLES, SEVERITIES):
        result = corrupt(x, name, severity, levels=table)
        assert result.shape == x.shape and result.dtype == x.dtype
        assert result.isfinite().all() and result.min() >= 0 and result.max() <= 1


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_extreme_images_stay_valid(name: str) -> None:
    """Black, white and a checkerboard."""
    board = (torch.arange(16)[:, None] + torch.arange(16)).remainder(2).float().expand(3, -1, -1)
    x = torch.stack([torch.zeros(3, 16, 16), torch.ones(3, 16, 16), board])
    result = corrupt(x, name, 5)
    assert result.isfinite().all() and result.min() >= 0 and result.max() <= 1


@given(
    name=st.sampled_from(list(CORRUPTIONS)),
    severity=st.sampled_from(SEVERITIES),
    size=st.tuples(st.integers(8, 40), st.integers(8, 40)),
    channels=st.sampled_from([1, 3, 4]),
    order=st.permutations(range(6)),
    cut=st.integers(1, 5),
    table=st.sampled_from(TABLES),
)
def test_neither_batch_nor_order_change_a_bit(
    name: str, severity: int, size: tuple[int, int], channels: int, order: list[int], cut: int, table: str
) -> None:
    x, ids = smooth_images(6, channels, *size), torch.tensor([7, 8, 1, 0, 2**40, 3])
    whole = corrupt(x, name, severity, ids=ids, levels=table)
    parts = [torch.tensor(order[:cut]), torch.tensor(order[cut:])]
    for part in parts:
        assert torch.equal(corrupt(x[part], name, severity, ids=ids[part], levels=table), whole[part])


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_the_id_and_the_seed_key_the_randomness(name: str) -> None:
    x = smooth_images(1, 3, 16, 16).expand(3, -1, -1, -1)
    first, second, third = corrupt(x, name, 3, ids=torch.tensor([4, 5, 4]))
    assert torch.equal(first, third)
    random = name not in {
        "defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression",
    }  # fmt: skip
    assert torch.equal(first, second) != random
    other = corrupt(x[:1], name, 3, ids=torch.tensor([4]), seed=1)[0]
    assert torch.equal(first, other) != random


def test_the_caller_keeps_images_and_random_state() -> None:
    x = smooth_images(2, 3, 16, 16)
    before, state = x.clone(), torch.get_rng_state()
    for name in CORRUPTIONS:
        corrupt(x, name, 5)
    assert torch.equal(x, before) and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", GROWING)
@pytest.mark.parametrize("table", TABLES)
def test_images_get_farther_from_the_clean_one_with_the_severity(name: str, table: str) -> None:
    side = {"cifar": 32, "tiny-imagenet": 64, "imagenet": 128}[table]
    x = smooth_images(12, 3, side, side)
    distances = [float((corrupt(x, name, s, levels=table) - x).flatten(1).norm(dim=1).mean()) for s in SEVERITIES]
    assert distances[0] > 0
    # A tenth for those that draw little at random, such as one cloud an image.
    assert all(b > 0.9 * a for a, b in itertools.pairwise(distances)) and distances[4] > 1.1 * distances[0]


def test_on_real_images_too(fashion: Tensor) -> None:
    for name in GROWING:
        distances = [float((corrupt(fashion, name, s) - fashion).flatten(1).norm(dim=1).mean()) for s in SEVERITIES]
        assert all(b > 0.95 * a for a, b in itertools.pairwise(distances)), name


def test_no_two_corruptions_are_alike(fashion: Tensor) -> None:
    results = {name: corrupt(fashion[:8], name, 5) for name in CORRUPTIONS}
    for one, other in itertools.combinations(results, 2):
        assert (results[one] - results[other]).abs().mean() > 1e-3, (one, other)


@pytest.mark.parametrize("name", GEOMETRIC)
@pytest.mark.parametrize("table", TABLES)
def test_moving_light_about_leaves_a_constant_image(name: str, table: str) -> None:
    x = torch.full((1, 3, 40, 32), 0.3)
    for severity in SEVERITIES:
        torch.testing.assert_close(corrupt(x, name, severity, levels=table), x, atol=2e-6, rtol=0)


def test_contrast_and_jpeg_leave_a_constant_image() -> None:
    x = torch.full((1, 3, 16, 16), 102 / 255)
    torch.testing.assert_close(corrupt(x, "contrast", 5), x)
    torch.testing.assert_close(corrupt(x, "jpeg_compression", 1), x, atol=1.5 / 255, rtol=0)


# --- each against its definition


def test_gaussian_noise_has_its_standard_deviation() -> None:
    x = torch.full((8, 3, 64, 64), 0.5)
    for severity, level in enumerate(LEVELS["gaussian_noise"]["cifar"], 1):
        noise = corrupt(x, "gaussian_noise", severity, levels="cifar") - x
        assert float(noise.std()) == pytest.approx(level, rel=0.02) and abs(float(noise.mean())) < 0.02 * level


@pytest.mark.parametrize("shade", [0, 1, 77, 255])
def test_shot_noise_counts_poisson_photons(shade: int) -> None:
    x = torch.full((4, 1, 64, 64), shade / 255)
    for table, severity in (("cifar", 3), ("imagenet", 3), ("imagenet", 5)):
        level = LEVELS["shot_noise"][table][severity - 1]
        counts = torch.poisson(x.double() * level, generator=torch.Generator().manual_seed(0))
        expected = (counts / level).clamp(max=1)
        result = corrupt(x, "shot_noise", severity, levels=table).double()
        torch.testing.assert_close((result * level).round() / level, result, atol=1e-6, rtol=0)
        error = 5 * float(expected.std()) * (2 / x.numel()) ** 0.5
        assert float(result.mean()) == pytest.approx(float(expected.mean()), abs=error)
        assert float(result.std()) == pytest.approx(float(expected.std()), rel=0.1, abs=1e-3)


def test_impulse_noise_flips_its_share_both_ways() -> None:
    x = torch.full((8, 3, 64, 64), 0.4)
    for severity, level in enumerate(LEVELS["impulse_noise"]["imagenet"], 1):
        result = corrupt(x, "impulse_noise", severity, levels="imagenet")
        assert float((result == 0).double().mean()) == pytest.approx(level / 2, rel=0.1)
        assert float((result == 1).double().mean()) == pytest.approx(level / 2, rel=0.1)
        assert float((result == x).double().mean()) == pytest.approx(1 - level, rel=0.02)


def test_defocus_blur_spreads_a_point_over_a_disk() -> None:
    x = torch.zeros(1, 1, 65, 65)
    x[..., 32, 32] = 1
    disk = corrupt(x, "defocus_blur", 5, levels="imagenet")[0, 0]  # radius 10
    place = torch.arange(65) - 32
    distance = (place[:, None] ** 2 + place**2).float().sqrt()
    assert disk[distance > 12.1].max() < 1e-6 and float(disk.sum()) == pytest.approx(1, abs=1e-4)
    inside = disk[distance < 8]
    assert float(inside.max() - inside.min()) < 1e-6 and float(inside.mean()) == pytest.approx(1 / 317, rel=1e-3)


def test_motion_blur_smears_a_point_to_one_side() -> None:
    x = torch.zeros(8, 1, 73, 73)
    x[..., 36, 36] = 1
    trail = corrupt(x, "motion_blur", 4, levels="imagenet")
    torch.testing.assert_close(trail.sum((1, 2, 3)), torch.ones(8))
    # An angle of at most 45 degrees: the trail runs along the columns, to the left of the point.
    assert trail[..., 37:].max() == 0 and ((trail > 0).any(2).sum(2) > 20).all()


def test_zoom_blur_keeps_the_middle_and_moves_the_rest_outwards() -> None:
    x = torch.zeros(1, 1, 101, 101)
    x[..., 50, 50], x[..., 50, 80] = 1, 1
    result = corrupt(x, "zoom_blur", 5, levels="imagenet")[0, 0, 50]
    assert result[50] == result.max() and result[81:90].max() > 0 and result[60:79].max() == 0


def test_glass_blur_moves_pixels_by_its_reach_at_most() -> None:
    """At the weakest level the smoothing changes nothing, and every pixel comes from beside it."""
    x = torch.rand(1, 1, 24, 24, generator=torch.Generator().manual_seed(0))
    result = corrupt(x, "glass_blur", 1, levels="cifar")[0, 0]
    sources = (result[:, :, None, None] - x[0, 0]).abs() < 1e-6
    place = torch.arange(24)
    apart = torch.maximum(
        (place[:, None, None, None] - place[None, None, :, None]).abs(),
        (place[None, :, None, None] - place[None, None, None, :]).abs(),
    )
    # Copies of copies travel on to the top left; elsewhere one step is the most.
    assert sources.flatten(2).any(2).all() and (sources & (apart <= 4)).flatten(2).any(2).all()
    assert (result != x[0, 0]).double().mean() > 0.5
    assert torch.equal(result[0], x[0, 0, 0]) and torch.equal(result[:, 0], x[0, 0, :, 0])


def test_brightness_keeps_hue_and_saturation() -> None:
    x = torch.tensor([0.6, 0.3, 0.15]).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    result = corrupt(x, "brightness", 2, levels="imagenet")  # + 0.2
    torch.testing.assert_close(result[0, :, 0, 0], torch.tensor([0.8, 0.4, 0.2]))
    assert torch.equal(
        corrupt(torch.zeros(1, 3, 8, 8), "brightness", 1, levels="imagenet"), torch.full((1, 3, 8, 8), 0.1)
    )


def test_contrast_shrinks_around_the_mean_of_each_channel() -> None:
    x = smooth_images(2, 3, 16, 16)
    means = x.mean((2, 3), keepdim=True)
    torch.testing.assert_close(corrupt(x, "contrast", 3, levels="imagenet"), means + 0.2 * (x - means))


@pytest.mark.parametrize("size", [(8, 11), (28, 28), (32, 32), (50, 37)], ids=str)
def test_pixelate_is_that_of_pillow(size: tuple[int, int]) -> None:
    pixels = (smooth_images(1, 1, *size)[0, 0] * 255).round().byte()
    for table, severity in itertools.product(TABLES, SEVERITIES):
        level = LEVELS["pixelate"][table][severity - 1]
        small = Image.fromarray(pixels.numpy()).resize(
            (max(1, int(size[1] * level)), max(1, int(size[0] * level))), Image.Resampling.BOX
        )
        expected = np.asarray(small.resize(size[::-1], Image.Resampling.BOX)) / 255
        result = corrupt(pixels[None, None] / 255, "pixelate", severity, levels=table)[0, 0]
        # Pillow rounds to 8 bits after the rows and after the columns.
        assert np.abs(result.numpy() - expected).max() <= 1.01 / 255


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_is_that_of_pillow(channels: int) -> None:
    pixels = (smooth_images(1, channels, 24, 24)[0] * 255).round().byte().permute(1, 2, 0).numpy()
    stream = io.BytesIO()
    Image.fromarray(pixels.squeeze()).save(stream, "JPEG", quality=LEVELS["jpeg_compression"]["cifar"][2])
    expected = np.asarray(Image.open(stream)).reshape(pixels.shape)
    result = corrupt(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255, "jpeg_compression", 3)
    assert np.array_equal((result[0].permute(1, 2, 0) * 255).round().byte().numpy(), expected)


def test_fog_keeps_the_largest_value_and_hides_contrast() -> None:
    x = smooth_images(4, 3, 64, 64)
    result = corrupt(x, "fog", 5)
    assert (result.amax((1, 2, 3)) <= x.amax((1, 2, 3)) + 1e-6).all()
    # Without the cloud, the image is still there at its strength.
    thickness, most = LEVELS["fog"]["tiny-imagenet"][4][0], x.amax((1, 2, 3), keepdim=True)
    cloud = result * (most + thickness) / most - x
    assert float((cloud[:, 0] - cloud[:, 1]).abs().max()) < 1e-4
    assert cloud.min() + 1e-4 >= 0 and cloud.max() <= thickness + 1e-4


def test_snow_and_frost_whiten(fashion: Tensor) -> None:
    for name in ("snow", "frost"):
        assert corrupt(fashion, name, 5).mean() > corrupt(fashion, name, 1).mean() > fashion.mean()


def test_elastic_transform_moves_but_hardly_recolours() -> None:
    """A smooth ramp is read elsewhere: values stay within its range, and one channel moves with the other."""
    ramp = torch.linspace(0.2, 0.8, 32).expand(32, 32)
    x = torch.stack([ramp, 1 - ramp])[None].expand(4, -1, -1, -1)
    for table, severity in itertools.product(TABLES, SEVERITIES):
        result = corrupt(x, "elastic_transform", severity, levels=table)
        assert result.min() >= 0.2 - 1e-5 and result.max() <= 0.8 + 1e-5
        torch.testing.assert_close(result[:, 0], 1 - result[:, 1], atol=1e-5, rtol=0)
        assert not torch.allclose(result, x, atol=1e-2)


# --- which strengths


@pytest.mark.parametrize(
    ("size", "table"),
    [((8, 8), "cifar"), ((32, 32), "cifar"), ((28, 300), "cifar"), ((46, 64), "tiny-imagenet"),
     ((64, 64), "tiny-imagenet"), ((96, 96), "tiny-imagenet"), ((121, 500), "imagenet"),
     ((224, 224), "imagenet"), ((1024, 1024), "imagenet")],
)  # fmt: skip
def test_the_size_chooses_the_strengths(size: tuple[int, int], table: str) -> None:
    assert levels_for(*size) == table


def test_every_corruption_has_five_levels_in_every_table() -> None:
    assert len(CORRUPTIONS) == 15 and set(LEVELS) == set(CORRUPTIONS)
    assert all(len(LEVELS[name][table]) == 5 for name in LEVELS for table in TABLES)


# --- errors


def test_errors_say_what_is_wrong() -> None:
    x = torch.rand(2, 3, 16, 16)
    with pytest.raises(UsageError, match="gaussian_noise"):
        corrupt(x, "gaussian_nois", 1)
    with pytest.raises(UsageError, match="severity is one of 1, 2, 3, 4, 5, got 6"):
        corrupt(x, "fog", 6)
    with pytest.raises(UsageError, match=r"float images \[n, C, H, W\]"):
        corrupt((x * 255).byte(), "fog", 1)
    with pytest.raises(UsageError, match="at least 8 x 8"):
        corrupt(x[..., :7], "fog", 1)
    with pytest.raises(UsageError, match=r"in \[0, 1\], got values from .* to 255"):
        corrupt(x.clone().fill_(255), "fog", 1)
    with pytest.raises(UsageError, match="sample ids"):
        corrupt(x, "fog", 1, ids=torch.arange(3))
    with pytest.raises(UsageError, match="table of corruption levels"):
        corrupt(x, "fog", 1, levels="cifar10")
    with pytest.raises(UsageError, match="each once"):
        corruption_accuracy(nn.Identity(), [(x, torch.zeros(2))], ["fog", "fog"])
    with pytest.raises(UsageError, match="severities"):
        corruption_accuracy(nn.Identity(), [(x, torch.zeros(2))], ["fog"], [0])
    assert corrupt(x[:0], "fog", 1).shape == (0, 3, 16, 16)


# --- accuracy


class Brightness(nn.Module):
    """Two classes, by whether the image is brighter than one half."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.flatten(1).mean(1)
        return torch.stack([0.5 - mean, mean - 0.5], 1)


def test_accuracy_is_counted_over_all_images() -> None:
    means = torch.tensor([0.05, 0.19, 0.32, 0.44, 0.6, 0.9])
    x, y = means.view(-1, 1, 1, 1).expand(-1, 1, 16, 16), (means > 0.5).long()
    y[0] = 1  # wrong without corruption
    report = corruption_accuracy(Brightness(), [(x[:4], y[:4]), (x[4:], y[4:])], ["brightness", "contrast"], (1, 3, 5))
    assert report.clean == pytest.approx(5 / 6) and len(report) == 6
    assert report.names == ("brightness", "contrast") and report.levels == ("cifar",)
    # + 0.05, 0.15, 0.3: 0.44 crosses one half at the second, 0.32 at the third.
    torch.testing.assert_close(report.accuracy[0], torch.tensor([5, 4, 3]).double() / 6)
    torch.testing.assert_close(report.accuracy[1], torch.full((3,), 5 / 6, dtype=torch.float64))
    assert report.mean == pytest.approx(float(report.accuracy.mean()))
    assert report.by_corruption["brightness"] == pytest.approx(4 / 6)
    assert report.by_severity[5] == pytest.approx((3 + 5) / 12)
    assert report.correct[3, 0].tolist() == [True, False, False] and report.correct[5].all()


def test_frost_tells_in_the_report_that_it_is_drawn() -> None:
    x = torch.rand(2, 1, 8, 8)
    written = corruption_accuracy(Brightness(), [(x, torch.zeros(2).long())], ["frost", "fog"], [1]).to_dict()
    assert list(written["notes"]) == ["frost"] and "photographs" in written["notes"]["frost"]
    assert written["accuracy"]["fog"].keys() == {"1"} and written["images"] == 2


def test_batches_do_not_change_the_report(fashion: Tensor) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10))
    y, ids = torch.arange(60) % 10, torch.arange(60)
    names = ["gaussian_noise", "glass_blur", "frost"]
    whole = corruption_accuracy(model, [(fashion, y, ids)], names, [2, 5])
    order = torch.randperm(60)
    loader = [(fashion[part], y[part], ids[part]) for part in order.split(7)]
    parts = corruption_accuracy(model, loader, names, [2, 5])
    assert torch.equal(whole.correct, parts.correct) and torch.equal(parts.ids, ids)
    assert model.training and model[2].training


def test_an_empty_loader_is_an_error() -> None:
    with pytest.raises(UsageError, match="yields no batch"):
        corruption_accuracy(Brightness(), [])
