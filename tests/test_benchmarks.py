"""The benchmarks: the other side of the comparison is what it says, and every script runs to its end at tiny size."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from test_upstream_arithmetic import attention as attention_head_by_head
from tiny import randomize

from benchmarks import bench_filter, bench_gpu, bench_sampling, bench_training, upstream_style
from benchmarks.measure import count_flops
from benchmarks.setting import ROOT, SIZES, make_inputs, make_ours, sample_given
from ldm.modules.attention import CrossAttention
from ldm.modules.autoencoder import ConvAttention
from ldm.sampling.modes import MODES


@pytest.fixture(scope="module")
def ours():
    return make_ours(SIZES["tiny"], "cpu")


@pytest.mark.parametrize("kind", ["naive", "sdpa"])
def test_upstream_style_walk_ends_where_ours_does(ours, kind):
    inputs = make_inputs(SIZES["tiny"], ours, 2, "cpu")
    conditions, null, noise = inputs["conditions"], inputs["null"], inputs["noise"]
    randomize(ours, 0.15)
    ours.null_conditions = lambda conditions, drops=None: null
    exact = sample_given(ours, conditions, noise, replace(MODES["exact"], num_steps=4, guidance_scale=9.0))
    theirs = upstream_style.sample_latent(ours, conditions, null, noise, 4, 9.0, kind)
    assert (exact - theirs).abs().max() <= 1e-4 * theirs.std()
    for key in conditions:  # a condition that did not matter would hide a difference
        other = {**conditions, key: conditions[key] * 0.5}
        changed = upstream_style.sample_latent(ours, other, null, noise, 4, 9.0, kind)
        assert (changed - theirs).abs().max() > 1e-3 * theirs.std(), key


@torch.no_grad()
def test_naive_attention_is_attention():
    layer, query, source = CrossAttention(16, 12, 8, 2), torch.randn(2, 5, 16), torch.randn(2, 7, 12)
    expected = attention_head_by_head({"a." + k: v for k, v in layer.state_dict().items()}, "a", query, source)
    with upstream_style.attention_of("naive"):
        torch.testing.assert_close(layer(query, source), expected, rtol=1e-5, atol=1e-6)
        conv = ConvAttention(32)
        naive = conv(x := torch.randn(2, 32, 3, 4))
    torch.testing.assert_close(conv(x), naive, rtol=1e-4, atol=1e-5)
    assert layer.forward.__func__ is CrossAttention.forward is not upstream_style.naive_cross_attention


def test_flops_of_a_product_and_of_attention():
    """On a CPU the counter finds none in attention: hence the meta tensors."""
    q = torch.empty(1, 2, 8, 4, device="meta")
    assert count_flops(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q)) == 2 * 2 * 2 * 8 * 8 * 4 / 1e9
    assert count_flops(lambda: torch.empty(3, 5, device="meta") @ torch.empty(5, 7, device="meta")) == 210 / 1e9


def test_bench_sampling(tmp_path):
    pytest.importorskip("diffusers")
    out = tmp_path / "lines.jsonl"
    bench_sampling.main(["--size", "tiny", "--device", "cpu", "--rounds", "1", "--warm_ups", "0", "--steps", "1",
                         "--no_memory", "--out", str(out)])  # fmt: skip
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert lines[1]["largest_difference"] <= 1e-4 * lines[1]["mean_size"]
    arms = {line["arm"]: line for line in lines if "arm" in line}
    assert list(arms) == list(bench_sampling.ARMS) and all(line["image"] > 0 for line in arms.values())
    # Less arithmetic is what the savings are for: stems and text once, and half the encoders.
    assert arms["turbo"]["gflop_a_step"] < arms["exact"]["gflop_a_step"] <= arms["upstream_naive"]["gflop_a_step"]
    assert any("speed per FLOP" in key for key in lines[-1])


def test_memory_is_measured_in_a_fresh_process():
    command = [sys.executable, bench_sampling.__file__, "--memory_of", "exact", "--size", "tiny", "--device", "cpu"]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    peak = json.loads(answer.stdout.splitlines()[-1])
    assert 0 <= peak["walk"] <= peak["all"] < 500


def test_bench_training(tmp_path):
    pytest.importorskip("diffusers")
    out = tmp_path / "lines.jsonl"
    bench_training.main(["--size", "tiny", "--device", "cpu", "--rounds", "1", "--steps", "1", "--no_memory",
                         "--out", str(out)])  # fmt: skip
    lines = {line.get("arm"): line for line in map(json.loads, out.read_text().splitlines())}
    assert set(bench_training.ARMS) < set(lines)
    assert lines["ours_cached_latents"]["gflop_a_sample"] < lines["ours"]["gflop_a_sample"]
    assert 0 < lines["ours"]["wait"] < 1


def test_bench_filter(monkeypatch, capsys):
    flags = ["--tiles", "2", "--size", "64", "--classes", "3", "--rounds", "1", "--ext", "png"]
    monkeypatch.setattr("sys.argv", ["bench_filter.py", *flags])
    threads = torch.get_num_threads()
    try:
        bench_filter.main()
    finally:
        torch.set_num_threads(threads)
    out = capsys.readouterr().out
    assert "3 classes: 0 of 8,192 pixels differ" in out and "times as fast" in out


def test_every_row_of_the_gpu_script_works(tmp_path):
    pytest.importorskip("diffusers")
    out = tmp_path / "lines.jsonl"
    assert bench_gpu.main(["--tiny", "--no_compile", "--device", "cpu", "--out", str(out)]) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert not [line for line in lines if "error" in line]
    assert {line["row"] for line in lines} == {"machine", "matmul", "copy", "attention", "forward", "autoencoder",
                                               "inference.py", "walk", "training"}  # fmt: skip
    assert any(line.get("attention") == "naive" for line in lines)
    assert [line["exit_code"] for line in lines if line["row"] == "inference.py"] == [0, 0]


def test_gpu_script_says_what_failed_and_what_it_left_out(tmp_path, monkeypatch):
    def broken(machine):
        yield {"row": "fine"}
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(bench_gpu, "PARTS", (broken,))
    out = tmp_path / "lines.jsonl"
    assert bench_gpu.main(["--tiny", "--device", "cpu", "--out", str(out)]) == 1
    assert "no such kernel" in out.read_text() and '"fine"' in out.read_text()
    assert bench_gpu.main(["--tiny", "--device", "cpu", "--seconds", "-1", "--out", str(out)]) == 0
    assert "left_out" in out.read_text()


def test_gate_script_paints_and_compares_what_it_is_told(tmp_path):
    """With stand-ins for both programs: rows are chosen, modes and their flags arrive, the first is compared with."""
    manifest, log = tmp_path / "rows.json", tmp_path / "log"
    manifest.write_text("".join(f'{{"row": {i}}}\n' for i in range(10)))
    stand_in = tmp_path / "python"
    stand_in.write_text(f'#!/bin/sh\necho "$@" >> {log}\ntouch {tmp_path}/out/results.md\n')
    stand_in.chmod(0o755)
    environment = {**os.environ, "OUT": f"{tmp_path}/out", "DATA_ROOT": "d", "TXT_FILE": str(manifest), "ROWS": "2",
                   "EVERY": "4", "SEGMENTOR": "s", "PYTHON": str(stand_in), "PYTHON_SEG": str(stand_in),
                   "MODES": "plain --mode exact\nquick --mode fast --num_steps 7"}  # fmt: skip
    subprocess.run(["sh", str(ROOT / "benchmarks/gate.sh")], env=environment, check=True)
    assert (tmp_path / "out/rows.json").read_text() == '{"row": 0}\n{"row": 4}\n'
    first, second, judged = log.read_text().splitlines()
    assert first.endswith("--mode exact") and second.endswith("--mode fast --num_steps 7")
    assert f"--exact {tmp_path}/out/plain --run {tmp_path}/out/quick --outdir" in judged
