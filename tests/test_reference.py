"""Reference augmentation: exactness of the identity, geometry, independence of the samples, reproducibility."""

import math

import pytest
import torch

from ldm.data.reference import (
    SYM6,
    ReferenceAugment,
    flip_randomly,
    jitter_colours,
    mirror_index,
    resample_affine,
    translate_mirrored,
)

SIZES = [(32, 32), (24, 41), (7, 5)]


def make_noise(batch: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def smooth_value(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """A smooth image as a function of pixels from the centre."""
    channels = [torch.sin(0.11 * x + 0.07 * y + phase) * torch.cos(0.05 * x - 0.13 * y) for phase in (0.0, 1.0, 2.0)]
    return 0.8 * torch.stack(channels)


def centred_grid(height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    y, x = torch.meshgrid(torch.arange(float(height)), torch.arange(float(width)), indexing="ij")
    return x - (width - 1) / 2, y - (height - 1) / 2


def affine(batch: int, scale: float = 1.0, angle: float = 0.0, offset: tuple[float, float] = (0.0, 0.0)) -> tuple:
    return torch.full((batch,), scale), torch.full((batch,), angle), torch.tensor(offset).expand(batch, 2)


def test_filter_is_orthonormal_to_its_even_shifts():
    for shift in range(0, len(SYM6), 2):
        product = sum(a * b for a, b in zip(SYM6, SYM6[shift:], strict=False))
        assert product == pytest.approx(1.0 if shift == 0 else 0.0, abs=1e-10)
    assert sum(SYM6) == pytest.approx(math.sqrt(2), abs=1e-10)
    pywt = pytest.importorskip("pywt")
    assert pytest.approx(pywt.Wavelet("sym6").dec_lo, abs=1e-12) == SYM6


@pytest.mark.parametrize("size", SIZES)
def test_identity_parameters_give_the_input_back(size):
    image = make_noise(2, *size)
    assert (resample_affine(image, *affine(2)) - image).abs().max() < 1e-4
    assert torch.equal(translate_mirrored(image, torch.zeros(2, 2, dtype=torch.int64)), image)


@pytest.mark.parametrize("size", SIZES)
def test_whole_pixel_translation_follows_the_mirror_formula(size):
    height, width = size
    image = make_noise(2, height, width)
    shift = torch.tensor([[3, -2], [-width - 4, 2 * height]])
    moved = translate_mirrored(image, shift)
    for sample, (right, down) in enumerate(shift.tolist()):
        for y in range(height):
            for x in range(width):
                row = height - 1 - abs(height - 1 - (y - down) % (2 * height - 2))
                column = width - 1 - abs(width - 1 - (x - right) % (2 * width - 2))
                assert torch.equal(moved[sample, :, y, x], image[sample, :, row, column])


def test_whole_pixel_offset_of_the_resampling_agrees_with_the_translation():
    image = make_noise(1, 40, 30)
    resampled = resample_affine(image, *affine(1, offset=(3.0, -2.0)))
    moved = translate_mirrored(image, torch.tensor([[3, -2]]))
    assert (resampled - moved)[:, :, 8:-8, 8:-8].abs().max() < 1e-4
    # A shift beyond two image widths still finds mirror images, not zeros.
    far = resample_affine(image * 0 + 0.7, *affine(1, offset=(75.0, 90.0)))
    torch.testing.assert_close(far, torch.full_like(far, 0.7), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("scale", "angle", "offset"),
    [(1.0, 0.3, (0.0, 0.0)), (1.25, -0.2, (2.3, -1.6)), (0.9, 0.0, (0.5, 0.25)), (1.0, math.pi, (0.0, 0.0))],
)
def test_rotation_scale_and_offset_on_a_smooth_image(scale, angle, offset):
    height, width = 48, 64
    x, y = centred_grid(height, width)
    image = smooth_value(x, y)[None]
    u, v = x - offset[0], y - offset[1]
    source_x = (math.cos(angle) * u - math.sin(angle) * v) / scale
    source_y = (math.sin(angle) * u + math.cos(angle) * v) / scale
    result = resample_affine(image, *affine(1, scale, angle, offset))[0]
    is_inside = (source_x.abs() < width / 2 - 4) & (source_y.abs() < height / 2 - 4)
    assert is_inside.float().mean() > 0.5
    assert (result - smooth_value(source_x, source_y))[:, is_inside].abs().max() < 4e-3


def test_mirror_continues_a_smooth_image_at_the_border():
    height, width = 32, 40
    x, y = centred_grid(height, width)
    result = resample_affine(smooth_value(x, y)[None], *affine(1, offset=(12.0, 0.0)))[0]
    folded = mirror_index(torch.arange(float(width)) - 12, width) - (width - 1) / 2
    assert (result - smooth_value(folded.expand(height, width), y)).abs().max() < 2e-2


def test_shrinking_does_not_alias():
    x, _ = centred_grid(48, 48)
    stripes = torch.cos(math.pi * 0.95 * x).expand(1, 3, 48, 48)
    shrunk = resample_affine(stripes, *affine(1, scale=0.6))
    # These stripes are finer than the pixels of the shrunk image, which must show grey.
    assert stripes.std() > 0.6
    assert shrunk[:, :, 8:-8, 8:-8].std() < 0.15


@pytest.mark.parametrize("settings", [{}, {"colour_jitter": 0.3, "flip": True}])
def test_a_sample_does_not_depend_on_its_batch_mates(settings):
    augment = ReferenceAugment(p=0.7, **settings)
    image = make_noise(6, 24, 30)
    others = make_noise(6, 24, 30, seed=1)
    others[2] = image[2]
    first = augment(image, torch.Generator().manual_seed(5))
    second = augment(others, torch.Generator().manual_seed(5))
    torch.testing.assert_close(first[2], second[2], rtol=0, atol=1e-6)
    assert not torch.allclose(first[3], second[3])


def test_generator_decides_and_gates_are_per_sample():
    augment = ReferenceAugment()
    image = make_noise(400, 12, 12)
    first, again = (augment(image, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, augment(image, torch.Generator().manual_seed(4)))
    is_unchanged = (first == image).flatten(1).all(1).float().mean().item()
    assert is_unchanged == pytest.approx(0.88**4, abs=0.08)  # 60 % of the samples are hit by none of the four
    assert first.shape == image.shape and first.dtype == torch.float32 and first.abs().max() <= 1


def test_off_means_the_same_object_and_no_random_numbers():
    image = make_noise(2, 16, 16)
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    assert ReferenceAugment(p=0.0)(image, generator) is image
    assert torch.equal(generator.get_state(), before)
    assert not ReferenceAugment().state_dict()


def test_flips_reach_all_symmetries_of_a_square():
    image = make_noise(1, 9, 9).expand(8, -1, -1, -1)
    choices = torch.cartesian_prod(*[torch.tensor([False, True])] * 3)
    flipped = flip_randomly(image, choices)
    assert len({tuple(sample.flatten().tolist()) for sample in flipped}) == 8
    assert torch.equal(flipped[4], image[0].flip(2)) and torch.equal(flipped[1], image[0].transpose(1, 2))
    assert flip_randomly(make_noise(2, 9, 6), choices[:2]).shape == (2, 3, 9, 6)


def test_colour_jitter_changes_what_it_says():
    image = make_noise(3, 8, 8) * 0.3
    strength = (0.2, 1.0, 1.0)
    torch.testing.assert_close(jitter_colours(image, torch.zeros(3, 3), strength), image)
    brighter = jitter_colours(image, torch.tensor([[1.0, 0, 0]]).expand(3, 3), strength)
    torch.testing.assert_close(brighter, image + 0.2)
    contrast = jitter_colours(image, torch.tensor([[0, 1.0, 0]]).expand(3, 3), strength)
    torch.testing.assert_close(contrast.std((1, 2, 3)), 2 * image.std((1, 2, 3)))
    grey = jitter_colours(image, torch.tensor([[0, 0, -1.0]]).expand(3, 3), (0.0, 0.0, 30.0))
    assert (grey.amax(1) - grey.amin(1)).max() < 1e-5


@pytest.mark.parametrize("bad", [{"p": 1.2}, {"scale_std": -1}, {"colour_jitter": (0.1, 0.1)}, {"colour_jitter": -1.0}])
def test_bad_settings_are_errors(bad):
    with pytest.raises(ValueError, match="Expected"):
        ReferenceAugment(**bad)


def test_bad_images_are_errors():
    for image in (torch.zeros(3, 8, 8), torch.zeros(1, 4, 8, 8), torch.zeros(1, 3, 8, 8, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"Expected \(B, 3, H, W\)"):
            ReferenceAugment()(image)
