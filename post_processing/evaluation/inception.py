"""The Inception network whose features FID and KID are taken from, built for the published weight file.

The file is `pt_inception-2015-12-05-6726825d.pth` of pytorch-fid (or torch-fidelity's
`weights-inception-2015-12-05-6726825d.pth`): the network of the original FID. It differs from torchvision's Inception
in its averages (the border does not count) and in the last block (maximum instead of average).
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.util import UserError

SIZE = 299  # pixels that the network was trained at


class ConvUnit(nn.Module):
    """Convolution, batch norm, ReLU; padded to keep the size unless `valid`."""

    def __init__(self, inputs: int, outputs: int, kernel: tuple[int, int], stride: int = 1, valid: bool = False):
        super().__init__()
        padding = (0, 0) if valid else (kernel[0] // 2, kernel[1] // 2)
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, h, w) -> (B, outputs, h', w')."""
        return F.relu(self.bn(self.conv(x)))


# One unit: name, width, kernel (a number = square), stride and padding. Units of a branch follow each other; where a
# branch ends in a tuple of two units, both see what came before and their results are joined.
Unit = tuple


class Block(nn.Module):
    """Branches of ConvUnits and one of pooling, joined in channels."""

    def __init__(self, inputs: int, branches: Sequence[Sequence[Unit]], pool: str, pool_unit: Unit | None) -> None:
        """Build the branches.

        Args:
            inputs: channels of the input.
            branches: units (name, outputs, kernel) of each branch, or a pair of units that split its end.
            pool: `average`, `maximum`, or `reduce` (maximum of every second place; the units that end the branches
                have stride 2 then).
            pool_unit: unit after the pooling; None = none.
        """
        super().__init__()
        self.pool = pool
        self.plan: list[list[tuple[str, ...]]] = []
        for branch in branches:
            width, names = inputs, []
            for place, step in enumerate(branch):
                units = step if isinstance(step[0], tuple) else (step,)
                last = place == len(branch) - 1 and pool == "reduce"
                for name, outputs, kernel in units:
                    self.add_module(name, ConvUnit(width, outputs, kernel, 2 if last else 1, valid=last))
                names.append(tuple(unit[0] for unit in units))
                width = units[0][1]
            self.plan.append(names)
        self.pool_name = pool_unit[0] if pool_unit else None
        if pool_unit:
            self.add_module(pool_unit[0], ConvUnit(inputs, pool_unit[1], pool_unit[2]))

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, h, w) -> (B, sum of the branches, h', w')."""
        results = []
        for branch in self.plan:
            parts = [x]
            for names in branch:
                parts = [self.get_submodule(name)(parts[0]) for name in names]
            results += parts
        if self.pool == "average":
            pooled = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        else:
            pooled = F.max_pool2d(x, 3, 2) if self.pool == "reduce" else F.max_pool2d(x, 3, 1, 1)
        results.append(self.get_submodule(self.pool_name)(pooled) if self.pool_name else pooled)
        return torch.cat(results, dim=1)


def block_a(inputs: int, pooled: int) -> Block:
    """Block at 35 x 35: 1x1, 5x5 and double 3x3 branches."""
    return Block(inputs, [
        [("branch1x1", 64, (1, 1))],
        [("branch5x5_1", 48, (1, 1)), ("branch5x5_2", 64, (5, 5))],
        [("branch3x3dbl_1", 64, (1, 1)), ("branch3x3dbl_2", 96, (3, 3)), ("branch3x3dbl_3", 96, (3, 3))],
    ], "average", ("branch_pool", pooled, (1, 1)))  # fmt: skip


def block_b(inputs: int) -> Block:
    """Reduction to 17 x 17."""
    return Block(inputs, [
        [("branch3x3", 384, (3, 3))],
        [("branch3x3dbl_1", 64, (1, 1)), ("branch3x3dbl_2", 96, (3, 3)), ("branch3x3dbl_3", 96, (3, 3))],
    ], "reduce", None)  # fmt: skip


def block_c(inputs: int, width: int) -> Block:
    """Block at 17 x 17: 7x7 convolutions as products of 1x7 and 7x1."""
    row, column = (1, 7), (7, 1)
    return Block(inputs, [
        [("branch1x1", 192, (1, 1))],
        [("branch7x7_1", width, (1, 1)), ("branch7x7_2", width, row), ("branch7x7_3", 192, column)],
        [("branch7x7dbl_1", width, (1, 1)), ("branch7x7dbl_2", width, column), ("branch7x7dbl_3", width, row),
         ("branch7x7dbl_4", width, column), ("branch7x7dbl_5", 192, row)],
    ], "average", ("branch_pool", 192, (1, 1)))  # fmt: skip


def block_d(inputs: int) -> Block:
    """Reduction to 8 x 8."""
    return Block(inputs, [
        [("branch3x3_1", 192, (1, 1)), ("branch3x3_2", 320, (3, 3))],
        [("branch7x7x3_1", 192, (1, 1)), ("branch7x7x3_2", 192, (1, 7)), ("branch7x7x3_3", 192, (7, 1)),
         ("branch7x7x3_4", 192, (3, 3))],
    ], "reduce", None)  # fmt: skip


def block_e(inputs: int, pool: str) -> Block:
    """Block at 8 x 8: branches that end in a 1x3 and a 3x1 convolution side by side."""
    return Block(inputs, [
        [("branch1x1", 320, (1, 1))],
        [("branch3x3_1", 384, (1, 1)), (("branch3x3_2a", 384, (1, 3)), ("branch3x3_2b", 384, (3, 1)))],
        [("branch3x3dbl_1", 448, (1, 1)), ("branch3x3dbl_2", 384, (3, 3)),
         (("branch3x3dbl_3a", 384, (1, 3)), ("branch3x3dbl_3b", 384, (3, 1)))],
    ], pool, ("branch_pool", 192, (1, 1)))  # fmt: skip


class InceptionFeatures(nn.Module):
    """Pooled features of Inception v3, 2048 numbers an image; frozen.

    Source: Szegedy et al. 2016; Heusel et al. 2017 for their use in FID.
    """

    def __init__(self, weights: str | Path | None = None) -> None:
        """Build the network and load the weights; None leaves them random, for tests."""
        super().__init__()
        self.Conv2d_1a_3x3 = ConvUnit(3, 32, (3, 3), 2, valid=True)
        self.Conv2d_2a_3x3 = ConvUnit(32, 32, (3, 3), valid=True)
        self.Conv2d_2b_3x3 = ConvUnit(32, 64, (3, 3))
        self.Conv2d_3b_1x1 = ConvUnit(64, 80, (1, 1))
        self.Conv2d_4a_3x3 = ConvUnit(80, 192, (3, 3), valid=True)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = block_a(192, 32), block_a(256, 64), block_a(288, 64)
        self.Mixed_6a = block_b(288)
        self.Mixed_6b, self.Mixed_6c = block_c(768, 128), block_c(768, 160)
        self.Mixed_6d, self.Mixed_6e = block_c(768, 160), block_c(768, 192)
        self.Mixed_7a = block_d(768)
        self.Mixed_7b, self.Mixed_7c = block_e(1280, "average"), block_e(2048, "maximum")
        if weights is not None:
            self.load_state_dict(read_inception_weights(weights, self.state_dict()))
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 RGB -> (B, 2048) float32; resized to 299 x 299 bilinearly, as pytorch-fid does."""
        x = F.interpolate(images.float() / 255, (SIZE, SIZE), mode="bilinear", align_corners=False) * 2 - 1
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = F.max_pool2d(x, 3, 2)
        for name in ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c"):
            x = self.get_submodule(f"Mixed_{name}")(x)
        return x.mean(dim=(2, 3))


def read_inception_weights(path: str | Path, own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a weight file that the network has; the classifier in it is not used.

    Raises:
        FileNotFoundError: if there is no such file.
        UserError: if it is another network's.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"--inception: file not found: {path}. Give pt_inception-2015-12-05-6726825d.pth.")
    state = torch.load(path, map_location="cpu", weights_only=True)
    kept = {name: state[name] for name in own if name in state}
    # files of torch 0.4 have no such counters, and nothing reads them
    kept |= {name: tensor for name, tensor in own.items() if name.endswith("num_batches_tracked") and name not in kept}
    wrong = [name for name, tensor in own.items() if name not in kept or kept[name].shape != tensor.shape]
    if wrong:
        raise UserError(f"--inception {path}: {len(wrong)} tensors are missing or have another shape "
                        f"({', '.join(wrong[:3])}). Expected pt_inception-2015-12-05-6726825d.pth.")  # fmt: skip
    return kept
