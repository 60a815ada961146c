"""Random moves, turns and scalings of reference images, on the batch and its device."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Decomposition low-pass of the wavelet sym6 (PyWavelets): orthonormal to its own even shifts, so that up- and
# downsampling by two with it give the input back.
SYM6 = (
    0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633, 0.4910559419267466,
    0.787641141030194, 0.3379294217276218, -0.07263752278646252, -0.021060292512300564, 0.04472490177066578,
    0.0017677118642428036, -0.007800708325034148,
)  # fmt: skip
# Where the filter puts smooth content, in samples of the fine grid: fine sample m lies at pixel (m - DELAY) / 2.
DELAY = sum(index * tap for index, tap in enumerate(SYM6)) / sum(SYM6)
# Pixels beyond the border in which fine samples are computed, not mirrored: what the downsampling filter reaches.
MARGIN = 4
PADDING = MARGIN + len(SYM6) // 2
LUMA = (0.299, 0.587, 0.114)


class ReferenceAugment(nn.Module):
    """Augment references: whole-pixel shift, scaling, rotation, sub-pixel shift; each per sample with probability p.

    What comes in from outside the image is its mirror image. A sample depends on its own pixels and parameters
    only, never on the rest of the batch. The module has no parameters, runs without gradients, ignores train and eval
    mode, and does not wait for the device. The defaults are those of the TISynth paper's code.

    Differences from that code: the mirror goes on without end (there: at most one image wide, then zeros), positions
    take the delay of the filter into account, the result is clamped to [-1, 1].

    Args:
        p: probability of each geometric operation, in [0, 1].
        translate_int_max: largest whole-pixel shift, as a fraction of width and height.
        rotate_frac_max: largest angle, as a fraction of 180 degrees.
        scale_std: standard deviation of the base-2 logarithm of the scale; one scale for both axes.
        translate_frac_std: standard deviation of the sub-pixel shift, as a fraction of width and height.
        colour_jitter: strength of brightness (added, uniform in +-strength), contrast and saturation (factor
            2 ** uniform in +-strength): one number for all, or three. 0 = off; otherwise on every sample.
        flip: random flips along both axes and, for square images, a random transposition: the eight symmetries of
            the square with equal probability, independent of p.

    Raises:
        ValueError: if an argument is out of range.

    Source: Karras et al. 2020, "Training generative adversarial networks with limited data", appendix B (operations).
    """

    def __init__(self, p: float = 0.12, translate_int_max: float = 0.125, rotate_frac_max: float = 0.1,
                 scale_std: float = 0.2, translate_frac_std: float = 0.125,
                 colour_jitter: float | tuple[float, float, float] = 0.0, flip: bool = False) -> None:
        super().__init__()
        jitter = (colour_jitter,) * 3 if isinstance(colour_jitter, int | float) else tuple(colour_jitter)
        ranges = {"translate_int_max": translate_int_max, "rotate_frac_max": rotate_frac_max, "scale_std": scale_std,
                  "translate_frac_std": translate_frac_std}
        if not 0 <= p <= 1:
            raise ValueError(f"reference augmentation: p is {p}. Expected a probability in [0, 1].")
        for name, value in ranges.items():
            if value < 0:
                raise ValueError(f"reference augmentation: {name} is {value}. Expected 0 or more.")
        if len(jitter) != 3 or min(jitter) < 0:
            raise ValueError(
                f"reference augmentation: colour_jitter is {colour_jitter}. Expected one number of 0 or more, or three "
                "(brightness, contrast, saturation)."
            )
        self.p, self.flip, self.colour_jitter = p, flip, jitter
        self.translate_int_max, self.rotate_frac_max = translate_int_max, rotate_frac_max
        self.scale_std, self.translate_frac_std = scale_std, translate_frac_std

    @torch.no_grad()
    def forward(self, image: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Augment a batch.

        Args:
            image: (B, 3, H, W) float32 in [-1, 1], any H and W of at least 2.
            generator: source of the random numbers; None = the CPU's global one, so that all devices draw the same.

        Returns:
            Augmented batch, (B, 3, H, W) float32 in [-1, 1]; a sample that no operation hits comes back unchanged.

        Raises:
            ValueError: if the image is of another form.
        """
        if image.ndim != 4 or image.shape[1] != 3 or min(image.shape[2:]) < 2 or not image.is_floating_point():
            raise ValueError(
                f"reference augmentation: image is {tuple(image.shape)} {image.dtype}. Expected (B, 3, H, W) float in "
                "[-1, 1] with H and W of at least 2."
            )
        image = image.float()  # the filters lose the finest detail in half precision
        if self.flip:
            image = flip_randomly(image, self._draw(torch.rand, image, 3, generator) < 0.5)
        if self.p > 0:
            image = self._move(image, generator)
        if any(self.colour_jitter):
            image = jitter_colours(image, (2 * self._draw(torch.rand, image, 3, generator) - 1), self.colour_jitter)
        return image

    def extra_repr(self) -> str:
        """Settings for the printed module."""
        return f"p={self.p}, colour_jitter={self.colour_jitter}, flip={self.flip}"

    def _draw(self, kind: Callable[..., Tensor], image: Tensor, count: int,
              generator: torch.Generator | None) -> Tensor:
        source = "cpu" if generator is None else generator.device
        return kind(len(image), count, generator=generator, device=source).to(image.device, non_blocking=True)

    def _move(self, image: Tensor, generator: torch.Generator | None) -> Tensor:
        height, width = image.shape[2:]
        is_on = self._draw(torch.rand, image, 4, generator) < self.p
        uniform = 2 * self._draw(torch.rand, image, 3, generator) - 1
        normal = self._draw(torch.randn, image, 3, generator)
        size = torch.tensor([width, height], device=image.device)

        shift = (uniform[:, :2] * self.translate_int_max * size).round().long()
        image = translate_mirrored(image, shift * is_on[:, :1])

        scale = torch.exp2(normal[:, 0] * self.scale_std * is_on[:, 1])
        angle = uniform[:, 2] * math.pi * self.rotate_frac_max * is_on[:, 2]
        offset = normal[:, 1:] * self.translate_frac_std * size * is_on[:, 3:]
        is_resampled = is_on[:, 1:].any(1)
        if image.device.type == "cpu":
            # Elsewhere, picking samples would make the host wait for the device.
            rows = is_resampled.nonzero().flatten()
            if len(rows):
                image = image.clone()
                image[rows] = resample_affine(image[rows], scale[rows], angle[rows], offset[rows])
            return image
        return torch.where(is_resampled[:, None, None, None], resample_affine(image, scale, angle, offset), image)


def mirror_index(index: Tensor, size: int) -> Tensor:
    """Fold indices (or positions) into [0, size - 1], as mirrors at the first and the last pixel centre would."""
    last = size - 1
    return last - (last - index.remainder(2 * last)).abs()


def translate_mirrored(image: Tensor, shift: Tensor) -> Tensor:
    """Shift each image (B, C, H, W) by whole pixels (B, 2) int64, to the right and down; what comes in is mirrored."""
    batch, channels, height, width = image.shape
    columns = mirror_index(torch.arange(width, device=image.device) - shift[:, :1], width)  # (B, W)
    rows = mirror_index(torch.arange(height, device=image.device) - shift[:, 1:], height)  # (B, H)
    sample = torch.arange(batch, device=image.device)[:, None, None, None]
    channel = torch.arange(channels, device=image.device)[:, None, None]
    return image[sample, channel, rows[:, None, :, None], columns[:, None, None, :]]


def resample_affine(image: Tensor, scale: Tensor, angle: Tensor, offset: Tensor) -> Tensor:
    """Scale, rotate and shift each image about its centre, without aliasing, in a mirrored surrounding.

    The image is upsampled by two, read bilinearly on a grid twice as fine as the output, and downsampled by two. The
    output pixel at p (from the centre) shows the input at R(angle) (p - offset) / scale.

    Args:
        image: (B, C, H, W) float32 in [-1, 1].
        scale: (B,) magnification, above 0.
        angle: (B,) radians, from the x axis (right) to the y axis (down).
        offset: (B, 2) shift in pixels to the right and down.

    Returns:
        Resampled images, (B, C, H, W) float32 in [-1, 1].

    Source: Karras et al. 2020, appendix B; Daubechies 1992, section 8.1.1 (symlets).
    """
    height, width = image.shape[2:]
    device = image.device
    rows, columns = (mirror_index(torch.arange(-PADDING, n + PADDING, device=device), n) for n in (height, width))
    fine = image[:, :, rows][:, :, :, columns]
    fine = upsample_axis(upsample_axis(fine, 2), 3)  # (B, C, 2H + ..., 2W + ...)

    # Output positions in pixels from the centre, at the places of the fine samples that the downsampling reads.
    y, x = ((torch.arange(2 * n + len(SYM6) - 2, device=device) - DELAY) / 2 - (n - 1) / 2 for n in (height, width))
    x = x[None, None, :] - offset[:, 0, None, None]  # (B, 1, W')
    y = y[None, :, None] - offset[:, 1, None, None]  # (B, H', 1)
    cos, sin = (f(angle)[:, None, None] / scale[:, None, None] for f in (torch.cos, torch.sin))
    source_x = _to_grid(cos * x - sin * y, width, fine.shape[3])
    source_y = _to_grid(sin * x + cos * y, height, fine.shape[2])

    with torch.autocast(device.type, enabled=False):
        grid = torch.stack([source_x, source_y], dim=-1)  # (B, H', W', 2)
        fine = F.grid_sample(fine, grid, mode="bilinear", padding_mode="border", align_corners=True)
    return downsample_axis(downsample_axis(fine, 2), 3).clamp(-1, 1)


def upsample_axis(image: Tensor, dim: int) -> Tensor:
    """Double the samples along one axis, 2 or 3: zeros in between, then the low-pass, whose sum is the root of 2.

    N samples become 2 N + 10.
    """
    taps = len(SYM6) // 2
    image = F.pad(image, (taps - 1, taps - 1) if dim == 3 else (0, 0, taps - 1, taps - 1))
    phases = [_filter_axis(image, SYM6[phase::2][::-1], dim) for phase in (0, 1)]
    return torch.stack(phases, dim=dim + 1).flatten(dim, dim + 1)


def downsample_axis(image: Tensor, dim: int) -> Tensor:
    """Low-pass and keep every second sample along one axis, 2 or 3; undoes `upsample_axis`: 2 N + 10 become N."""
    even, odd = image.unflatten(dim, (-1, 2)).unbind(dim + 1)
    return _filter_axis(even.contiguous(), SYM6[::2], dim) + _filter_axis(odd.contiguous(), SYM6[1::2], dim)


def flip_randomly(image: Tensor, is_on: Tensor) -> Tensor:
    """Flip images (B, C, H, W) left-right, upside down and, if square, along the diagonal, where is_on (B, 3) says."""
    left_right, upside_down, diagonal = is_on[:, :, None, None, None].unbind(1)
    image = torch.where(left_right, image.flip(3), image)
    image = torch.where(upside_down, image.flip(2), image)
    if image.shape[2] == image.shape[3]:
        image = torch.where(diagonal, image.transpose(2, 3), image)
    return image


def jitter_colours(image: Tensor, amount: Tensor, strength: tuple[float, float, float]) -> Tensor:
    """Change brightness, contrast (about the sample's mean) and saturation (about each pixel's grey).

    Args:
        image: (B, 3, H, W) float32 in [-1, 1].
        amount: (B, 3) in [-1, 1], for brightness, contrast, saturation; 0 = no change.
        strength: what an amount of 1 means: added value, and base-2 logarithms of the two factors.

    Returns:
        Images, same shape, clamped to [-1, 1].
    """
    change = amount * torch.tensor(strength, device=image.device)
    brightness, contrast, saturation = change[:, :, None, None, None].unbind(1)
    grey = (image * torch.tensor(LUMA, device=image.device)[:, None, None]).sum(1, keepdim=True)
    image = grey + (image - grey) * torch.exp2(saturation)
    mean = image.mean((1, 2, 3), keepdim=True)
    return (mean + (image - mean) * torch.exp2(contrast) + brightness).clamp(-1, 1)


def _filter_axis(image: Tensor, taps: tuple[float, ...], dim: int) -> Tensor:
    """Correlate along one axis, without padding; plain sums, because convolutions may run in reduced precision."""
    length = image.shape[dim] - len(taps) + 1
    result = image.narrow(dim, 0, length) * taps[0]
    for index, tap in enumerate(taps[1:], start=1):
        result.add_(image.narrow(dim, index, length), alpha=tap)
    return result


def _to_grid(position: Tensor, size: int, fine_size: int) -> Tensor:
    """Positions in pixels from the centre to grid_sample's coordinates on the padded fine samples."""
    position = position + (size - 1) / 2
    is_outside = (position < -MARGIN) | (position > size - 1 + MARGIN)
    position = torch.where(is_outside, mirror_index(position, size), position)
    return (2 * (position + PADDING) + DELAY) * (2 / (fine_size - 1)) - 1
