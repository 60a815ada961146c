"""Training on labels that are partly wrong: each pixel's label carries its domain, the loss corrects for its noise.

Ingredients of DLC (He, Yan, Diao, Sun, "Dynamic Loss Correction for Cross-Domain Remotely Sensed Segmentation", IEEE
TGRS 62, 2024): a noise transition matrix T in front of the cross entropy (forward correction: Patrini et al., CVPR
2017), estimated after a warm-up or learned with a volume term. Its training step was never published; this is our own.

A label j of domain d is written as j + 64 d, so crops, flips, CutMix and copy-paste carry the domain with it.
mmengine finds the classes of this file by their dotted paths; nothing is registered in mmseg.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from ldm.data.classes import IGNORE_INDEX
from ldm.util import UserError

DOTTED = "post_processing.segmentation.dlc."
CORRECTED_LOSS = DOTTED + "CorrectedCrossEntropy"
MARK_DOMAIN = DOTTED + "MarkDomain"
CODE = 64  # labels of one domain
WEIGHT_CODE = 256  # above label and domain: how much less than 1 a pixel counts, in 1/256
TRUSTED, SYNTHETIC, BORDER, PSEUDO = range(4)  # real pairs; synthetic pairs; their class borders; predicted labels
NUM_DOMAINS = 4
FLOOR = 1e-8  # of a transition probability
VOLUME_WEIGHT = 1e-2  # of log|det T| while it is learned (VolMinNet: Li et al., ICML 2021)
LEARNED_START = 0.97  # diagonal that a learned matrix starts from


def encode_domain(mask: np.ndarray, domain: int | np.ndarray) -> np.ndarray:
    """Write the domain into a mask: (H, W) uint8 of 0..63 or 255 -> label + 64 domain, 255 stays."""
    return np.where(mask == IGNORE_INDEX, IGNORE_INDEX, mask + CODE * np.uint8(domain)).astype(np.uint8)


def check_capacity(num_classes: int, domain: int) -> None:
    """UserError unless the labels of a domain fit into a byte beside 255."""
    if num_classes > CODE or num_classes - 1 + CODE * domain >= IGNORE_INDEX:
        most = min(CODE, IGNORE_INDEX - CODE * domain)
        raise UserError(f"noise correction: {num_classes} classes in domain {domain}. Expected at most {most}, since a "
                        "label and its domain share a byte. Merge classes, or train without.")


class MarkDomain:
    """Transform, first in a pipeline: codes the domain into `gt_seg_map`."""

    def __init__(self, domain: int, num_classes: int, border: int = 0) -> None:
        """Check that the codes fit.

        Args:
            domain: of all pixels.
            num_classes: K; ids beyond are an error.
            border: pixels (in the mask as stored) from a class border that get the domain BORDER; 0 = none do.
        Raises:
            UserError: if K labels of these domains do not fit into a byte.
        """
        for used in (domain, BORDER) if border else (domain,):
            check_capacity(num_classes, used)
        self.domain, self.num_classes, self.border = domain, num_classes, border

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        """Code the mask of one pair; ValueError naming ids that are no classes."""
        mask = results["gt_seg_map"]
        wrong = np.unique(mask[(mask >= self.num_classes) & (mask != IGNORE_INDEX)])
        if len(wrong):
            raise ValueError(f"mask {results.get('seg_map_path')}: ids {wrong.tolist()}. Expected 0.."
                             f"{self.num_classes - 1} or {IGNORE_INDEX}. Choose the right class table.")
        domain = np.where(find_borders(mask, self.border), BORDER, self.domain) if self.border else self.domain
        return {**results, "gt_seg_map": encode_domain(mask, domain)}


def find_borders(mask: np.ndarray, width: int) -> np.ndarray:
    """Pixels of a mask (H, W) uint8 within `width` pixels (of a square) of another value, (H, W) bool."""
    import cv2

    square = np.ones((2 * width + 1, 2 * width + 1), np.uint8)
    return cv2.dilate(mask, square) != cv2.erode(mask, square)


def decode_labels(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Take coded labels apart.

    Args:
        labels: integer; label + 64 domain, 255 = ignored, + 256 (256 - 256 weight) for pixels that count less than 1.
    Returns:
        Labels and domains (0 where ignored), weights float32 in [0, 1], and bool, true where not ignored.
    """
    code = labels & (WEIGHT_CODE - 1)
    is_valid = code != IGNORE_INDEX
    code = code.where(is_valid, code.new_zeros(()))
    return code & (CODE - 1), code >> 6, 1 - (labels >> 8) / WEIGHT_CODE, is_valid


class CorrectedCrossEntropy(nn.Module):
    """Cross entropy against labels that a transition matrix of their domain has made noisy.

    For a label j of domain d the loss is -log sum_i p_i T[d][i, j], with p the softmax of the logits: the network
    learns what the image shows, and T accounts for what the mask says. Where T is the identity it is the plain cross
    entropy, and equals mmseg's CrossEntropyLoss (avg_non_ignore). Predictions use plain logits. T is a buffer, so
    checkpoints hold it. Works in any head that calls its losses as mmseg's do.
    """

    def __init__(self, num_classes: int, label_smoothing: float = 0.0, is_learned: bool = False,
                 class_weight: Sequence[float] | None = None, loss_weight: float = 1.0) -> None:
        """Start with the identity in every domain.

        Args:
            num_classes: K, at most 64.
            label_smoothing: share of the loss that asks for equal probabilities, at pixels that are not trusted.
            is_learned: T of synthetic pixels is a parameter, trained once `set_transition({})` was called.
            class_weight: K weights of the classes (see without_weights).
            loss_weight: of the whole.
        Raises:
            UserError: if there are too many classes.
        """
        super().__init__()
        check_capacity(num_classes, TRUSTED)
        self.num_classes, self.label_smoothing = num_classes, label_smoothing
        self.is_learned, self.loss_weight = is_learned, loss_weight
        self.loss_name = "loss_ce"  # in the log
        identity = torch.eye(num_classes)
        self.register_buffer("transition", identity.repeat(NUM_DOMAINS, 1, 1))
        self.register_buffer("is_estimated", torch.tensor(False))
        weight = None if class_weight is None else torch.tensor(class_weight, dtype=torch.float32)
        self.register_buffer("class_weight", weight, persistent=False)
        if is_learned:
            rest = (1 - LEARNED_START) / max(1, num_classes - 1)
            start = (LEARNED_START * identity + rest * (1 - identity)).log()
            self.transition_logits = nn.Parameter(start)

    @torch.no_grad()
    def set_transition(self, transitions: Mapping[int, torch.Tensor]) -> None:
        """Correct from now on: domain -> (K, K); what is not named stays. ValueError for the trusted domain."""
        if TRUSTED in transitions:
            raise ValueError("noise correction: a matrix for trusted labels. Expected domains 1 to 3.")
        for domain, matrix in transitions.items():
            self.transition[domain] = matrix.to(self.transition)
        self.is_estimated.fill_(True)

    def current_transition(self) -> torch.Tensor:
        """(4, K, K) float32, differentiable where T is learned."""
        if not self.is_learned:
            return self.transition.float()
        learned = self.transition_logits.float().softmax(1)
        identity = torch.eye(self.num_classes, device=learned.device)
        learned = torch.where(self.is_estimated, learned, identity)
        return torch.stack([identity, learned, learned, identity])

    def without_weights(self, log_p: torch.Tensor) -> torch.Tensor:
        """Take the class weights out of log probabilities (B, K, H, W): log softmax of log p_i - log w_i.

        The weighted cross entropy of true labels leads to p_i ~ w_i P(i), which is wanted. Weights of *noisy* labels
        would not: T^-1 blows their tilt up. So the likelihood of a noisy label is that of P, found from p (the logit
        adjustment of Menon et al., ICLR 2021), and both kinds of pixels lead to the same p.
        """
        if self.class_weight is None:
            return log_p
        return (log_p - self.class_weight.clamp_min(FLOOR).log()[:, None, None]).log_softmax(1)

    def forward(self, seg_logits: torch.Tensor, seg_label: torch.Tensor, weight: torch.Tensor | None = None,
                **_: Any) -> torch.Tensor:
        """Mean loss over the pixels that are not ignored, 0 if all are.

        Args:
            seg_logits: (B, K, H, W).
            seg_label: (B, H, W) int64, coded (see decode_labels).
            weight: (B, H, W), multiplied with each pixel's loss.
        Raises:
            ValueError: for labels beyond K (on the CPU, where looking is cheap).
        """
        label, domain, share, is_valid = decode_labels(seg_label)
        if seg_label.device.type == "cpu" and int(label.max()) >= self.num_classes:
            wrong = label[label >= self.num_classes].unique().tolist()
            raise ValueError(f"loss: labels {wrong}. Expected 0..{self.num_classes - 1}, or 255 where there is none.")
        log_p = seg_logits.float().log_softmax(1)
        transition = self.current_transition()
        plain = -log_p.gather(1, label[:, None])[:, 0]
        given = transition.clamp_min(FLOOR).log().transpose(1, 2)[domain, label].movedim(-1, 1)  # T[d][:, j]
        corrected = -torch.logsumexp(self.without_weights(log_p) + given, 1)
        is_noisy = (transition != torch.eye(self.num_classes, device=transition.device)).flatten(1).any(1)[domain]
        loss = torch.where(is_noisy, corrected, plain)
        if self.label_smoothing:
            smooth = (1 - self.label_smoothing) * loss - self.label_smoothing * log_p.mean(1)
            loss = torch.where(domain == TRUSTED, loss, smooth)
        own = is_valid.float()
        if self.class_weight is not None:
            own = own * torch.where(is_noisy, own.new_ones(()), self.class_weight[label])
        total = (loss * own * share * (1 if weight is None else weight)).sum()
        mean = total / own.sum().clamp_min(torch.finfo(torch.float32).tiny)
        if self.is_learned:
            volume = torch.linalg.slogdet(transition[SYNTHETIC]).logabsdet
            mean = mean + VOLUME_WEIGHT * volume * self.is_estimated
        return self.loss_weight * mean


def find_losses(model: nn.Module) -> list[CorrectedCrossEntropy]:
    """The corrected losses of all heads of a model."""
    return [module for module in model.modules() if isinstance(module, CorrectedCrossEntropy)]
