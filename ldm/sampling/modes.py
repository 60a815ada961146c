"""How to sample, as one value: the solver, its steps, guidance and savings; the named modes; their flags.

Import-light, so that a command line is parsed without waiting for torch.
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from ldm.diffusion.spacing import ENDS, FROM_ZERO, SPACINGS

SOLVERS = ("ddim", "dpmpp_2m", "unipc", "ddpm")
# Settings of methods that have a flag, with the values that change nothing; a method says which it has, and checks
# them (Method.check). Records and fingerprints hold them beside the sampler's own, as they did before methods had any.
METHOD_SETTINGS = {"hint_scale": 1.0, "reference_scale": 1.0, "share_control": False, "reuse_every": 1}


@dataclass(frozen=True)
class Rectify:
    """How far the gradient of a guide moves clean latents towards the mask, and when (see ldm.sampling.rectify).

    Args:
        scale: of a step relative to the velocity, [0, 0.5]; with the rule `clamped` factor of the raw gradient.
        window: rectify at levels within these shares of the path; 1 is pure noise.
        steps: rectify the first so many evaluations instead; None = as window says.
        schedule: `constant`, or `falling` linearly to 0 over all steps.
        loss: over `all` labelled pixels, or those that the guide gets `wrong`.
        rule: `normalised`, or `clamped` (of the published code, flow paths only).
        log: decode once more to note the loss behind each step.
    Raises:
        ValueError: naming the field that is not possible.
    """

    scale: float = 0.2
    window: tuple[float, float] = (0.7, 1.0)
    steps: int | None = None
    schedule: str = "constant"
    loss: str = "all"
    rule: str = "normalised"
    log: bool = False

    def __post_init__(self) -> None:
        low, high = self.window
        for name, is_possible, expected in (
            ("scale", 0 <= self.scale <= 0.5, "a value in [0, 0.5]"),
            ("window", 0 <= low <= high <= 1, "0 <= low <= high <= 1"),
            ("steps", self.steps is None or self.steps >= 1, "at least 1"),
            ("schedule", self.schedule in ("constant", "falling"), "constant or falling"),
            ("loss", self.loss in ("all", "wrong"), "all or wrong"),
            ("rule", self.rule in ("normalised", "clamped"), "normalised or clamped"),
        ):
            if not is_possible:
                raise ValueError(f"--rectify_{name}: {getattr(self, name)!r} is not possible. Expected {expected}.")


# `upstream` is the public code's: four of its 23 steps, no normalisation.
PRESETS = {"default": Rectify(), "upstream": Rectify(0.1, steps=4, schedule="falling", loss="wrong", rule="clamped")}


@dataclass(frozen=True)
class Sampling:
    """How to get from noise to a latent.

    Args:
        solver: `ddim`, `dpmpp_2m` (DPM-Solver++), `unipc`, or `ddpm` (ancestral, with learned variance where the
            network has it).
        num_steps: network evaluations.
        eta: share of fresh noise in each step of ddim, [0, 1].
        spacing: of the timesteps: `leading`, `trailing`, `uniform_lambda`, `uniform` or `leading0` (see
            spaced_timesteps); of a flow path `uniform` or `trailing` (see FlowPath).
        end: `first` (variance of timestep 0) or `clean` (none; the only one of ddpm, of flow paths and of spacings from
            0).
        guidance_scale: weight of what guidance_drops of the model names, 1 = off; None = the model's own.
        guidance_interval: guide only at levels within these shares of the path.
        guidance_rescale: share of bringing the spread of the guided prediction back, [0, 1].
        strength: share of the path, (0, 1]: 1 starts from pure noise; below it a sample starts from its row's own
            image, noised to that level (Meng et al. 2022, SDEdit), and takes that share of num_steps.
        recolour_start: give that image the colours of its reference first (see transforms.recolour).
        method: settings of the method, by name (see Method.sampling_settings); what is not here is left as it is.
        rectify: correct clean latents with a guide, which is given beside these settings; None = no.
    Raises:
        ValueError: naming the field that is not possible.
    """

    solver: str = "ddim"
    num_steps: int = 50
    eta: float = 0.0
    spacing: str = "leading"
    end: str = "first"
    guidance_scale: float | None = None
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_rescale: float = 0.0
    strength: float = 1.0
    recolour_start: bool = False
    method: Mapping[str, Any] = field(default_factory=dict)
    rectify: Rectify | None = None

    def __post_init__(self) -> None:
        low, high = self.guidance_interval
        for name, is_possible, expected in (
            ("solver", self.solver in SOLVERS, f"one of {', '.join(SOLVERS)}"),
            ("num_steps", self.num_steps >= 1, "at least 1"),
            ("guidance_scale", self.guidance_scale is None or 0 < self.guidance_scale < math.inf, "above 0"),
            ("eta", 0 <= self.eta <= 1, "a value in [0, 1]"),
            ("eta", self.eta == 0 or self.solver == "ddim", "0, since only ddim has random steps"),
            ("spacing", self.spacing in SPACINGS, f"one of {', '.join(SPACINGS)}"),
            ("end", self.end in ENDS, f"one of {', '.join(ENDS)}"),
            ("end", self.end == "clean" or self.solver != "ddpm", "clean, since ddpm cannot end otherwise"),
            ("end", self.end == "clean" or self.spacing not in FROM_ZERO, f"clean with spacing {self.spacing}"),
            ("guidance_interval", 0 <= low <= high <= 1, "0 <= low <= high <= 1"),
            ("guidance_rescale", 0 <= self.guidance_rescale <= 1, "a value in [0, 1]"),
            ("rectify", self.rectify is None or self.solver != "ddpm", "none with ddpm"),
            ("strength", 0 < self.strength <= 1, "a value in (0, 1]"),
            ("recolour_start", not self.recolour_start or self.strength < 1,
             "false with strength 1, where no image is started from; give --strength below 1"),
        ):
            if not is_possible:
                raise ValueError(f"sampling: {name} is {getattr(self, name)!r}. Expected {expected}.")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for records and fingerprints; what is newer only where it is used, so that older runs go on."""
        values = asdict(self) | {"guidance_interval": list(self.guidance_interval)}
        values |= METHOD_SETTINGS | values.pop("method")
        rectify = values.pop("rectify") or {}
        values |= {f"rectify_{name}": list(value) if name == "window" else value
                   for name, value in rectify.items() if name != "log"}
        unused = {"strength": 1.0, "recolour_start": False}
        return {key: value for key, value in values.items() if key not in unused or value != unused[key]}


def make_sampling(base: Sampling, changes: Mapping[str, Any]) -> Sampling:
    """Settings with changes by name, those of the sampler and those of the method alike.

    Args:
        base: to start from.
        changes: fields of Sampling, a list for an interval; every other name is a setting of the method.
    Raises:
        ValueError: if a field is out of range.
    """
    known = {field.name for field in fields(Sampling)} - {"method", "rectify"}
    changes = {name: tuple(value) if isinstance(value, list) else value for name, value in changes.items()}
    own = {name: value for name, value in changes.items() if name in known}
    others = {name: value for name, value in changes.items() if name not in known}
    return replace(base, **own, method={**base.method, **others})


# `exact` is upstream's, and stands for what a model's config asks for. What `scripts/evaluate.py
# consistency` said of the others stands in docs/speed.md.
MODES = {
    "exact": Sampling(),
    "fast": Sampling(solver="unipc", num_steps=20, spacing="trailing", end="first"),
    "turbo": Sampling(solver="unipc", num_steps=20, spacing="trailing", end="first",
                      method={"share_control": True, "reuse_every": 2}),
}
# What a command line without --mode means: `fast`, which passed that gate. Not where a model's config asks for settings
# of its own, and not where flags describe the sampler: --ddim_steps and --ddim_eta of an upstream command mean DDIM.
DEFAULT_MODE = "fast"
SAMPLER = ("solver", "num_steps", "eta", "spacing", "end")


def add_sampling_flags(group: argparse._ArgumentGroup) -> None:
    """Add --mode and a flag for every field of Sampling; those that are not given leave the mode as it is."""
    modes = "; ".join(f"{name}: {mode.solver}, {mode.num_steps} steps" for name, mode in MODES.items())
    add = group.add_argument
    add("--mode", choices=list(MODES),
        help=f"settings to start from ({modes}; exact: as the model's config has it, else as said). Default: "
        f"{DEFAULT_MODE}; exact where the config has settings of its own, and with --ddim_steps, --ddim_eta, --solver, "
        "--spacing or --end")
    add("--ddim_steps", "--num_steps", dest="num_steps", type=int,
        help="network evaluations per image; default: the mode's")
    add("--ddim_eta", dest="eta", type=float, help="fresh noise per step of ddim, 0 to 1; default: 0")
    add("--scale", "--guidance_scale", dest="guidance_scale", type=float,
        help="classifier-free guidance scale; 1 = off, one branch; default: the model's own (mostly 9)")
    add("--hint_scale", type=float, help="guidance by the mask alone; default: 1, no extra branch")
    add("--reference_scale", type=float, help="guidance by the reference alone; default: 1")
    add("--guidance_interval", type=float, nargs=2, metavar=("LOW", "HIGH"),
        help="guide only at timesteps within these shares of all, 0 is clean; default: the mode's")
    add("--guidance_rescale", type=float, help="rein in the contrast of guidance, 0 to 1")
    add("--solver", choices=SOLVERS, help="default: the mode's")
    add("--spacing", choices=SPACINGS, help="of the timesteps; default: the mode's")
    add("--end", choices=ENDS, help="noise level of the last step; default: the mode's")
    add("--share_control", action=argparse.BooleanOptionalAction, default=None,
        help="approximation: one control branch for both halves of guidance; default: the mode's")
    add("--reuse_every", type=int,
        help="approximation: encoder and control branches at every n-th step only; default: the mode's")
    add("--strength", type=float,
        help="0 to 1: start from the row's own image (target), noised to this share of the timesteps; default: 1, pure "
        "noise")
    add("--recolour_start", action="store_true", default=None,
        help="with --strength: give that image the colours of the row's reference first")
    add("--guide", nargs="+", metavar="FILE",
        help="rectify: let a segmentor's gradient correct every image towards its mask; config and weights of "
        "scripts/train_segmentor.py, or the dotted path of a class of your own (with --allow_modules) and its files; "
        "default: no guide")
    add("--rectify_preset", choices=list(PRESETS),
        help="settings of rectifying to start from; upstream: a flow model's, as published")
    add("--rectify_scale", type=float,
        help="size of a step relative to the velocity, up to 0.5; default: the preset's, as of the next")
    add("--rectify_window", type=float, nargs=2, metavar=("LOW", "HIGH"),
        help="rectify at levels within these shares of the path, 1 is noise")
    add("--rectify_steps", type=int, help="rectify the first so many steps, whatever the window")
    add("--rectify_schedule", choices=["constant", "falling"], help="scale over the steps")
    add("--rectify_loss", choices=["all", "wrong"],
        help="pixels that count: all with a class, or those the guide gets wrong")
    add("--rectify_log", action="store_true", default=None,
        help="note the guide's loss behind every step too, for one decoding more")


def choose_sampling(args: argparse.Namespace, own: Sampling) -> Sampling:
    """Settings of a command line.

    Args:
        args: parsed with add_sampling_flags.
        own: the model's own, which `exact` stands for; its guidance scales are those of all modes.
    Returns:
        Settings without any None.
    Raises:
        ValueError: if a flag is out of range.
    """
    names = [field.name for field in fields(Sampling) if field.name not in ("method", "rectify")]
    given = given_flags(args, [*names, *METHOD_SETTINGS])
    modes = {name: keep_strengths(mode, own) for name, mode in MODES.items()}
    has_own = own != modes["exact"]
    name = args.mode or ("exact" if has_own or given.keys() & set(SAMPLER) else DEFAULT_MODE)
    mode = own if name == "exact" else modes[name]
    return replace(make_sampling(mode, given), rectify=choose_rectify(args))


def given_flags(args: argparse.Namespace, names: Sequence[str], prefix: str = "") -> dict[str, Any]:
    """Values of the flags that were given, by name; intervals as tuples."""
    values = {name: getattr(args, prefix + name) for name in names}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
            if value is not None}


def keep_strengths(mode: Sampling, own: Sampling) -> Sampling:
    """A mode with a model's own guidance scales: how strongly it wants to be guided is its own matter."""
    scales = {name: own.method[name] for name in ("hint_scale", "reference_scale") if name in own.method}
    return replace(mode, guidance_scale=own.guidance_scale, method={**mode.method, **scales})


def choose_rectify(args: argparse.Namespace) -> Rectify | None:
    """Settings of rectifying of a command line, None without a guide; ValueError for flags that need one."""
    names = [field.name for field in fields(Rectify) if field.name != "rule"]
    given = given_flags(args, names, "rectify_")
    if not args.guide:
        if given or args.rectify_preset:
            raise ValueError(f"--rectify_{next(iter(given), 'preset')}: there is no guide to rectify with. Expected "
                             "--guide CONFIG WEIGHTS. Add it, or leave the flag out.")
        return None
    if "window" in given:
        given.setdefault("steps", None)  # the steps of a preset would leave a window that was asked for without effect
    return replace(PRESETS[args.rectify_preset or "default"], **given)
