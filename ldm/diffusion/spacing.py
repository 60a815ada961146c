"""Which timesteps of a discrete path a sampler visits. Import-light: the command line needs the names without torch."""

from collections.abc import Sequence

import numpy as np

SPACINGS = ("leading", "trailing", "uniform_lambda", "uniform", "leading0")
FROM_ZERO = ("uniform", "leading0")  # spacings that evaluate the network at timestep 0 too
ENDS = ("clean", "first")


def check_spacing(spacing: str, known: Sequence[str] = SPACINGS) -> None:
    """ValueError for a spacing that is not among the known ones."""
    if spacing not in known:
        raise ValueError(f"spacing: {spacing!r} is unknown. Expected one of {', '.join(known)}.")


def spaced_timesteps(num_steps: int, alphas_cumprod: np.ndarray, spacing: str = "leading") -> list[int]:
    """Choose the timesteps that the network is evaluated at.

    Args:
        num_steps: how many, from 1 to T - 1, or to T with a spacing from 0.
        alphas_cumprod: share of signal variance at each timestep of the path, (T,) float64, falling.
        spacing: `leading` (upstream's, 1, 51, ...), `trailing` (equally spaced and starting at T - 1),
            `uniform_lambda` (equally spaced in the log of the signal-to-noise ratio, from T - 1 to 1), `uniform`
            (equally spaced from T - 1 to 0) or `leading0` (diffusers' default, 0, 50, ...).
    Returns:
        Exactly num_steps ascending timesteps, all at least 1 but for the last two spacings.
    Raises:
        ValueError: for an unknown spacing, or a count that is not possible.
    Source: Lin et al. 2024, Table 2 (leading, trailing); Lu et al. 2022, section 3.4 (uniform_lambda).
    """
    check_spacing(spacing)
    total = len(alphas_cumprod)
    if spacing in FROM_ZERO and num_steps == total:
        return list(range(total))
    if not 1 <= num_steps < total:
        raise ValueError(f"num_steps: {num_steps} steps are not possible. Expected 1 to {total - 1} for a path of "
                         f"{total} timesteps. 50 is a good choice.")
    leading = [index * total // num_steps + 1 for index in range(num_steps)]
    if spacing == "leading":
        return leading
    if spacing == "leading0":
        return [timestep - 1 for timestep in leading]
    if spacing == "uniform":
        return [round(index * (total - 1) / (num_steps - 1)) for index in range(num_steps)] if num_steps > 1 else [
            total - 1]
    if spacing == "trailing":
        chosen = [max(round(total - index * total / num_steps) - 1, 1) for index in reversed(range(num_steps))]
    else:
        rates = 0.5 * np.log(alphas_cumprod[1:] / (1 - alphas_cumprod[1:]))  # falling
        wanted = np.linspace(rates[0], rates[-1], num_steps) if num_steps > 1 else rates[-1:]
        chosen = [1 + int(np.abs(rates - rate).argmin()) for rate in wanted]
    # Neighbours can round to the same timestep: move them apart, upwards, then back below T.
    for index in range(1, num_steps):
        chosen[index] = max(chosen[index], chosen[index - 1] + 1)
    for index in range(num_steps):
        chosen[-1 - index] = min(chosen[-1 - index], total - 1 - index)
    return chosen
