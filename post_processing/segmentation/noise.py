"""How often masks say another class than their images show: estimates of the noise transition matrix T.

T[i, j] = P(mask says j | image shows i), rows sum to 1. Estimated without further labels from what neighbours in
feature space say (HOC: Zhu, Song, Liu, "Clusterability as an alternative to anchor points when learning with noisy
labels", ICML 2021), from masks that a person corrected, or from a segmentor whose own confusion is known. All assume
that the noise depends on the class only; HOC also that neighbours show the same class and have independent noise.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from ldm.cli import markdown_table
from ldm.files import write_json
from ldm.util import UserError

LEAST_POINTS = 200  # a class with fewer labels is taken to be free of noise
LEAST_DIAGONAL = 0.2  # below, the estimate would say that a class is mostly called something else
HOC_STEPS = 1000
TEACHER_STEPS, TEACHER_FINE_STEPS = 2000, 800
ROWS_AT_ONCE = 1024  # of a similarity matrix


def count_consensus(labels: torch.Tensor, features: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Count what points and their two nearest neighbours are labelled.

    Args:
        labels: (N,) int64, 0..K-1.
        features: (N, D) float; compared by the cosine.
        num_classes: K.
    Returns:
        (K, K, K) float64: points with label a whose nearest neighbour has label b and second nearest label c.
    Raises:
        ValueError: for fewer than three points.
    """
    if len(labels) < 3:
        raise ValueError(f"noise: {len(labels)} points. Expected three or more, each with two neighbours.")
    features = functional.normalize(features.float(), dim=1)
    codes = []
    for start in range(0, len(labels), ROWS_AT_ONCE):
        similarity = features[start : start + ROWS_AT_ONCE] @ features.T
        own = torch.arange(len(similarity), device=similarity.device)
        similarity[own, start + own] = -2.0  # below any cosine: a point is not its own neighbour
        first, second = labels[similarity.topk(2, dim=1).indices].unbind(1)
        codes.append((labels[start : start + ROWS_AT_ONCE] * num_classes + first) * num_classes + second)
    counts = torch.bincount(torch.cat(codes), minlength=num_classes**3)
    return counts.view(num_classes, num_classes, num_classes).double()


def estimate_hoc(counts: torch.Tensor) -> torch.Tensor:
    """Find the T under which points and their neighbours would be labelled as they are.

    Args:
        counts: (K, K, K) from count_consensus, of one or several sets of points.
    Returns:
        (K, K) float64. The start is near the identity: of the solutions, which a permutation of the classes does not
        tell apart, it takes the diagonally dominant one.
    """
    third = counts.double() / counts.sum().clamp_min(1)
    second, first = third.sum(2), third.sum((1, 2))

    def distance(prior: torch.Tensor, transition: torch.Tensor) -> torch.Tensor:
        seconds = torch.einsum("i,ij,ik->jk", prior, transition, transition)
        thirds = torch.einsum("i,ij,ik,il->jkl", prior, transition, transition, transition)
        return (prior @ transition - first).norm() + (seconds - second).norm() + (thirds - third).norm()

    return fit(distance, len(first), [(HOC_STEPS, 0.1)], third)


def estimate_from_teacher(predicted: torch.Tensor, confusion: torch.Tensor) -> torch.Tensor:
    """Find T from what a segmentor trained on true labels says about images whose masks are in doubt.

    Args:
        predicted: (K, K) shares or counts of pixels predicted k with given label j.
        confusion: (K, K) the segmentor's own P(predicted k | true i) on real validation tiles, rows sum to 1.
    Returns:
        (K, K) float64 T with predicted = confusion' diag(prior) T: prediction and mask are taken to be independent
        where the image shows one class, and the segmentor to be as good on these images as on the real ones.
    """
    shares, confusion = predicted.double() / predicted.sum(), confusion.double()

    def distance(prior: torch.Tensor, transition: torch.Tensor) -> torch.Tensor:
        return (confusion.T @ (prior[:, None] * transition) - shares).norm()

    rates = [(TEACHER_STEPS - TEACHER_FINE_STEPS, 0.05), (TEACHER_FINE_STEPS, 0.005)]
    return fit(distance, len(shares), rates, shares)


def fit(distance: Any, num_classes: int, rates: Sequence[tuple[int, float]], like: torch.Tensor) -> torch.Tensor:
    """Minimise a function of (prior, T), both softmax-parametrised, by Adam: [(steps, rate), ...]; returns T."""
    prior = torch.zeros(num_classes, dtype=like.dtype, device=like.device, requires_grad=True)
    rows = (5 * torch.eye(num_classes, dtype=like.dtype, device=like.device) - 1).requires_grad_()
    with torch.enable_grad():
        for steps, rate in rates:
            optimizer = torch.optim.Adam([prior, rows], lr=rate)
            for _ in range(steps):
                optimizer.zero_grad()
                distance(prior.softmax(0), rows.softmax(1)).backward()
                optimizer.step()
    return rows.detach().softmax(1)


def count_corrections(corrected: np.ndarray, given: np.ndarray, num_classes: int) -> np.ndarray:
    """Pixels by what a person sees and what the mask says: (K, K) int64; ignored pixels of either are left out."""
    is_known = (corrected < num_classes) & (given < num_classes)
    codes = corrected[is_known].astype(np.int64) * num_classes + given[is_known]
    return np.bincount(codes, minlength=num_classes**2).reshape(num_classes, num_classes)


def estimate_from_counts(counts: np.ndarray | torch.Tensor) -> torch.Tensor:
    """T of an audit: rows of (K, K) counts with 1 added on the diagonal, normalised; float64."""
    counts = torch.as_tensor(counts).double() + torch.eye(len(counts), dtype=torch.float64)
    return counts / counts.sum(1, keepdim=True)


def make_safe(transition: torch.Tensor, labels: torch.Tensor, names: Sequence[str]) -> tuple[torch.Tensor, list[str]]:
    """Replace rows of an estimate (K, K) that must not be trusted by those of the identity.

    Args:
        transition: the estimate.
        labels: (K,) points labelled with each class.
        names: of the classes.
    Returns:
        The matrix, and what was replaced and why.
    """
    transition = transition.double().clone()
    identity, notes = torch.eye(len(transition), dtype=torch.float64, device=transition.device), []
    for number, name in enumerate(names):
        diagonal, count = float(transition[number, number]), int(labels[number])
        if not torch.isfinite(transition[number]).all():
            reason = "the estimate is not finite"
        elif count < LEAST_POINTS:
            reason = f"{count} points, at least {LEAST_POINTS} are needed"
        elif diagonal < LEAST_DIAGONAL:
            reason = f"the estimate says {diagonal:.2f} of it is labelled right, at least {LEAST_DIAGONAL} are needed"
        else:
            continue
        transition[number] = identity[number]
        notes.append(f"{name}: taken to be free of noise ({reason})")
    return transition, notes


def describe(transition: torch.Tensor) -> dict[str, Any]:
    """A matrix as plain values: rows, diagonal, log|det| and total-variation distance from the identity."""
    transition = transition.double().cpu()
    diagonal = transition.diagonal()
    return {
        "transition": [[round(float(value), 6) for value in row] for row in transition],
        "diagonal": [round(float(value), 4) for value in diagonal],
        "log_abs_det": round(float(torch.linalg.slogdet(transition).logabsdet.clamp_min(-1e3)), 4),
        "distance_from_identity": round(float((1 - diagonal).mean()), 4),
    }


def write_noise(path: Path, transitions: Mapping[int, torch.Tensor], names: Sequence[str], estimator: str,
                **facts: Any) -> None:
    """Write estimates, domain -> (K, K), as JSON with how they were found and further plain values."""
    domains = {str(domain): describe(matrix) for domain, matrix in transitions.items()}
    write_json(path, {"classes": list(names), "estimator": estimator, "domains": domains, **facts})


def read_noise(path: str | Path, names: Sequence[str]) -> dict[int, torch.Tensor]:
    """Read the matrices of a noise.json, by domain, (K, K) float64.

    Raises:
        FileNotFoundError: if there is no such file.
        UserError: if it is something else, has other classes, or rows that are no probabilities.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"--noise_matrix: file not found: {path}. Give the noise.json of a training.")
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        classes = list(content["classes"])
        found = {int(domain): torch.tensor(entry["transition"], dtype=torch.float64)
                 for domain, entry in content["domains"].items()}  # fmt: skip
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: not an estimate of label noise ({type(error).__name__}: {error}). Expected the "
                        "noise.json that train_segmentor.py or audit_masks.py writes.") from error
    if classes != list(names):
        raise UserError(f"{path}: of classes {classes}. Expected {list(names)}. Estimate it for this class table.")
    for domain, matrix in found.items():
        is_sound = matrix.shape == (len(names),) * 2 and bool((matrix >= 0).all())
        if not is_sound or not torch.allclose(matrix.sum(1), matrix.new_ones(len(names)), atol=1e-3):
            raise UserError(f"{path}, domain {domain}: not a transition matrix of {len(names)} classes. Expected rows "
                            "of probabilities that sum to 1. Mend the file.")
    return found


def make_noise_table(transition: torch.Tensor, names: Sequence[str]) -> str:
    """Markdown table of a matrix: a row says how often an image's class is given each label."""
    heads = ["image shows", *(f"labelled {name}" for name in names)]
    rows = [[name, *(f"{value:.3f}" for value in row.tolist())] for name, row in zip(names, transition, strict=True)]
    return markdown_table(heads, rows).rstrip("\n")
