"""Prompts longer than the text encoder reads, through inference.py: cut with a warning, or read in pieces."""

import json

import numpy as np
import pytest
from painting import make_workspace, pixels, run, write_rows
from test_text import LONG

pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Four rows of one size: two short prompts, two long ones that differ behind the encoder's limit."""
    root = make_workspace(tmp_path_factory.mktemp("prompts"), ((8, 8),) * 4)
    rows = [json.loads(line) for line in (root / "rows.json").read_text().splitlines()]
    for row, prompt in zip(rows, ("a road", f"{LONG}, small houses", "a river", f"{LONG}, a wide lake"), strict=True):
        row |= {"prompt": prompt, "source": "mask_0.png", "ref_image": "ref_0.png"}
    write_rows(root / "rows.json", rows)
    return root


def paint(workspace, outdir, *flags: str) -> list[np.ndarray]:
    assert run(workspace, outdir, "--fixed_code", *flags) == 0
    found = pixels(outdir)
    return [found[name] for name in sorted(found)]


def test_cut_prompts_are_named_and_pieces_are_read(workspace, tmp_path, caplog):
    cut = paint(workspace, tmp_path / "cut")
    assert "2 of 4 different prompts are longer than the 14 tokens" in caplog.text
    assert "--prompt_pieces N" in caplog.text
    assert np.array_equal(cut[1], cut[3])  # what tells them apart was cut
    caplog.clear()
    whole = paint(workspace, tmp_path / "whole", "--prompt_pieces", "9")
    assert "different prompts" not in caplog.text
    assert not np.array_equal(whole[1], whole[3]) and not np.array_equal(whole[1], cut[1])
    assert np.array_equal(whole[0], cut[0]) and np.array_equal(whole[2], cut[2])  # short ones are as before


def test_an_image_does_not_depend_on_the_prompts_beside_it(workspace, tmp_path):
    """Nor on how often the run was interrupted: an image that is lost is generated alone."""
    together = paint(workspace, tmp_path / "together", "--prompt_pieces", "9", "--batch_size", "4")
    lost = sorted((tmp_path / "together/images").iterdir())[0:2]
    for path in lost:
        path.unlink()
    run(workspace, tmp_path / "together", "--verify")
    assert all(np.array_equal(a, b) for a, b in zip(
        together, paint(workspace, tmp_path / "together", "--prompt_pieces", "9", "--batch_size", "4"), strict=True))
    assert run(workspace, tmp_path / "together", "--prompt_pieces", "2") == 2  # another run
