"""The measurement of the gain: its stages, its numbers, and the whole chain on tiny nets with the real entry points."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from painting import make_workspace
from PIL import Image
from pixel import config, make

import inference
from ldm.files import file_sha256
from ldm.util import UserError
from ldm.weights.checkpoint import save_safetensors
from post_processing.gain.plan import ARMS, LABELS, Plan
from post_processing.gain.report import draw_curves, make_table, read_curves, summarise
from post_processing.gain.sets import (
    draw_shares,
    link_references,
    list_references,
    nearest_references,
    write_random_drop,
    write_targets,
)
from post_processing.gain.stages import Stage, StageRunner, make_slots
from post_processing.segmentation.self_training import list_targets

ROOT = Path(__file__).resolve().parents[1]


def append(file, word, code=0):
    """Command that adds a word to a file and exits."""
    return (sys.executable, "-c", f"open({str(file)!r}, 'a').write({word!r} + chr(10)); raise SystemExit({code})")


def words(file):
    return file.read_text().split() if file.exists() else []


def test_stages_run_in_order_once_and_again_after_a_change(tmp_path):
    log, source = tmp_path / "log", tmp_path / "source"
    source.write_text("a")

    def runner(word="b", extra=()):
        stages = [Stage("a", (append(log, "a"),), (), (str(source),)), Stage("b", (append(log, word),), ("a",)),
                  Stage("c", action=lambda: append_word(log, "c"), needs=("b",), settings={"k": 1}),
                  *extra]  # fmt: skip
        return StageRunner(stages, tmp_path / "out", make_slots(2))

    def append_word(file, word):
        file.write_text(file.read_text() + word + "\n")

    runner().run(False)
    assert words(log) == ["a", "b", "c"]
    runner(extra=[Stage("d", (append(log, "d"),))]).run(False)
    assert words(log) == ["a", "b", "c", "d"]
    with pytest.raises(UserError, match="2 stages were run with other settings .b: commands was"):
        runner("B").run(False)
    runner("B").run(True)
    assert words(log)[4:] == ["B", "c"]  # what depends on it too, what does not does not
    source.write_text("A")
    with pytest.raises(UserError, match="3 stages were run with other settings .a: inputs.*source was"):
        runner("B").run(False)


def test_a_failed_stage_is_named_and_the_rest_goes_on_later(tmp_path):
    log = tmp_path / "log"

    def stages(code):
        script = tmp_path / "script.py"
        script.write_text(f"print('the reason'); raise SystemExit({code})")
        return [Stage("a", (append(log, "a"),)), Stage("b", ((sys.executable, str(script)),), ("a",)),
                Stage("c", (append(log, "c"),), ("b",))]  # fmt: skip

    with pytest.raises(UserError, match=r"stage b: exit code 7 .*the reason.*log\.txt"):
        StageRunner(stages(7), tmp_path / "out", make_slots(1)).run(False)
    StageRunner(stages(0), tmp_path / "out", make_slots(1)).run(False)
    assert words(log) == ["a", "c"]


def test_shards_share_a_stage_and_slots_share_the_cores(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import os, sys\nopen(sys.argv[1] + sys.argv[-1].replace('/', '_'), 'w').write("
                      "os.environ['OMP_NUM_THREADS'] + ' ' + os.environ['CUDA_VISIBLE_DEVICES'])")  # fmt: skip
    slots = make_slots(2, ["3", "5"])
    stage = Stage("a", ((sys.executable, str(script), str(tmp_path / "shard_")),), is_sharded=True)
    StageRunner([stage], tmp_path / "out", slots).run(False)
    found = {path.name: path.read_text().split() for path in tmp_path.glob("shard_*")}
    assert set(found) == {"shard_0_2", "shard_1_2"} and {gpu for _, gpu in found.values()} == {"3", "5"}
    if len(os.sched_getaffinity(0)) > 1:
        assert not slots[0].cores & slots[1].cores


def test_a_signal_ends_the_processes_that_run(tmp_path):
    script = tmp_path / "measure.py"
    script.write_text(
        "import signal, sys\nfrom pathlib import Path\nfrom post_processing.gain.stages import *\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        "sleep = (sys.executable, '-c', \"import os, time; print(os.getpid(), flush=True); time.sleep(60)\")\n"
        f"StageRunner([Stage('a', (sleep,)), Stage('b', (sleep,))], Path({str(tmp_path / 'out')!r}), make_slots(1))"
        ".run(False)\n"
    )
    process = subprocess.Popen([sys.executable, script], env=os.environ | {"PYTHONPATH": str(ROOT)})
    log = tmp_path / "out/a/log.txt"
    while not (log.exists() and log.read_text().endswith("\n") and log.read_text().count("\n") > 1):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 143
    child = int(log.read_text().splitlines()[-1])
    deadline = time.time() + 10
    while Path(f"/proc/{child}/stat").exists() and Path(f"/proc/{child}/stat").read_text().split()[2] != "Z":
        assert time.time() < deadline
        time.sleep(0.05)
    assert not (tmp_path / "out/b/log.txt").exists()


def test_gains_are_paired_by_seed():
    def score(miou, road):
        return {"OA": 50.0, "mIoU": miou, "mAcc": 60.0, "IoU": {"road": road, "sea": 1.0}}

    scores = {"real": {1: score(40.0, 30.0), 2: score(44.0, 34.0)},
              "joint": {1: score(42.0, None), 2: score(47.0, 9.0)}}  # fmt: skip
    summary = summarise(scores)
    assert summary["joint"]["gain"] == (2.5, 0.71) and summary["joint"]["mIoU"] == (44.5, 3.54)
    assert summary["real"]["gain"] is None and summary["joint"]["IoU"]["road"] is None
    table = make_table(summary, {"real": "real", "joint": "both"}).splitlines()
    assert table[3] == "| both | 2 | 50.00 ± 0.00 | 44.50 ± 3.54 | 60.00 ± 0.00 | +2.50 ± 0.71 | - | 1.00 ± 0.00 |"
    assert len({line.count("|") for line in table}) == 1
    one = summarise({arm: {1: seeds[1]} for arm, seeds in scores.items()})
    assert one["joint"]["gain"] == (2.0, None)


def test_curves_are_read_past_torn_lines_and_their_legend_fits(tmp_path):
    for arm in ARMS:
        (tmp_path / arm / "1/vis_data").mkdir(parents=True)
        lines = ['{"step": 1, "loss": 4.0}', '{"mIoU": 3.0, "step": 2}', "[1]", '{"step": 2, "loss": 2.0}', '{"step":']
        (tmp_path / arm / "1/vis_data/scalars.json").write_text("\n".join(lines))
    curves = read_curves({arm: [tmp_path / arm] for arm in ARMS}, "loss")
    assert curves == {arm: [(1, 4.0), (2, 2.0)] for arm in ARMS}
    drawing = draw_curves(curves, "loss", LABELS)
    assert drawing.startswith("<svg") and drawing.rstrip().endswith("</svg>")
    assert drawing.count("<path") > len(ARMS) and draw_curves({}, "loss", LABELS) == ""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A tiny random generator, and twelve pairs of 32 x 32 from six images, whose colours are their classes."""
    root = make_workspace(tmp_path_factory.mktemp("gain"))
    random = np.random.default_rng(0)
    for folder in ("img", "label", "ref"):
        (root / folder).mkdir()
    rows = []
    for number in range(12):
        mask = np.kron(random.integers(0, 5, (2, 2)), np.ones((16, 16), int)).astype(np.uint8)
        image = (mask[..., None] * 45 + random.integers(0, 20, (32, 32, 3))).astype(np.uint8)
        name = f"scene{number // 2}_0000_{32 * (number % 2):04}.png"
        Image.fromarray(mask).save(root / "label" / name)
        Image.fromarray(image).save(root / "img" / name)
        Image.fromarray(image[::-1]).save(root / "ref" / name)
        rows.append({"source": f"label/{name}", "target": f"img/{name}"})
    for name, part in (("train", rows[:8]), ("test", rows[8:]), ("val", rows[6:8])):
        (root / f"{name}_set_items.json").write_text("".join(json.dumps(row) + "\n" for row in part))
    return root


def in_this_process(runner, name, command, slot, log_name):
    """Replaces StageRunner.run_command: the same entry point with the same arguments, without a new interpreter."""
    import importlib

    parts = list(command)
    start = parts.index("-m") + 1 if "-m" in parts else next(i for i, part in enumerate(parts) if part.endswith(".py"))
    module = parts[start].removesuffix(".py").replace("/", ".")
    arguments = parts[start + 1 :]
    RAN.append((module, name))
    (runner.folder / name / log_name).write_text(" ".join(arguments))
    code = importlib.import_module(module).main(arguments)
    assert not code, (module, code)


RAN: list[tuple[str, str]] = []


def measure(workspace, outdir, *extra):
    from scripts.measure_gain import main

    RAN.clear()
    flags = ["--class_table", "mini", "--data_root", workspace, "--references", workspace / "ref", "--ckpt",
             workspace / "tiny.safetensors", "--outdir", outdir, "--seeds", "1", "--steps", "2", "--batch_size", "2",
             "--num_masks", "3", "--num_per_mask", "2", "--inference_args", "--ddim_steps 2 --device cpu",
             "--resample_args", "--valid-ratio 0 --rare none", "--train_args", "--init_backbone=none",
             "--filter_args", "--device=cpu", *extra]  # fmt: skip
    main([str(flag) for flag in flags])


def make_plan(workspace, outdir, *extra):
    from scripts.measure_gain import build_parser

    flags = ["--class_table", "mini", "--ckpt", "x", "--references", str(workspace / "ref")]
    return Plan(build_parser().parse_args([*flags, "--data_root", str(workspace), "--outdir", str(outdir), *extra]))


def test_the_whole_chain_on_tiny_nets(workspace, tmp_path, monkeypatch, capsys):
    pytest.importorskip("mmseg")
    monkeypatch.setattr(StageRunner, "run_command", in_this_process)
    monkeypatch.setattr("ldm.generation.machine.stop_on_signals", contextlib.nullcontext)  # for main threads only
    monkeypatch.chdir(ROOT)
    out = tmp_path / "out"
    flags = ["--real_fraction", "0.5", "--val_txt_file", workspace / "val_set_items.json"]
    measure(workspace, out, "--arms", "joint,pretrain", *flags, "--dry_run")
    plan = capsys.readouterr().out
    assert "open     joint/seed_1   after sets, resample" in plan and not out.exists()
    halves = [line.split() for line in plan.partition("pretrain/seed_1   after")[2].splitlines()[1:3]]
    assert [half[half.index("--max_steps") + 1] for half in halves] == ["1", "1"]
    for flag in ("--init_from", "--train_txt_file"):
        assert [flag in half for half in halves] == [False, True]
    measure(workspace, out, "--arms", "joint,unfiltered,pretrain,recolour,dlc,random_drop,rectified",
            "--rectify_args", "--rectify_window 0 1", *flags)

    real = [json.loads(line) for line in (out / "sets/real.json").read_text().splitlines()]
    paint = [json.loads(line) for line in (out / "masks/synthesis.json").read_text().splitlines()]
    scenes = {Path(row["target"]).name.split("_")[0] for row in real}
    assert len(real) == 4 and len(scenes) == 2  # whole images
    assert len(paint) == 6 and {row["source"] for row in paint} <= {row["source"] for row in real}
    assert not {row["ref_image"] for row in paint} & {row["target"] for row in real}
    assert len(list((out / "unfiltered/images").iterdir())) == 6
    results = json.loads((out / "results.json").read_text())
    assert list(results["summary"]) == [
        "real", "joint", "unfiltered", "dlc", "random_drop", "rectified", "recolour", "pretrain"]
    plain, guided = (sorted((out / folder / "images").iterdir()) for folder in ("synthesis", "rectified_synthesis"))
    assert [path.name for path in plain] == [path.name for path in guided]
    assert any(one.read_bytes() != other.read_bytes() for one, other in zip(plain, guided, strict=True))
    fingerprint = json.loads((out / "rectified_synthesis/run.json").read_text())["settings"]
    assert fingerprint["guide"][2] == file_sha256(out / "real/seed_1/segmentor.pth")  # of the real pairs
    recoloured = [json.loads(line) for line in (out / "recolour/train_set_items.json").read_text().splitlines()]
    for row, item in zip(recoloured, paint, strict=True):  # the same masks and references, without the generator
        assert (out / "recolour" / row["source"]).read_bytes() == (workspace / item["source"]).read_bytes()
        image, reference = (np.asarray(Image.open(path)).reshape(-1, 3).mean(0) for path in (
            out / "recolour" / row["target"], workspace / item["ref_image"]))  # fmt: skip
        assert np.abs(image - reference).max() < 12
    filtering = (out / "filter/log.txt").read_text().split()
    assert filtering[filtering.index("--hardness_txt_file") + 1] == str(workspace / "val_set_items.json")
    noise = json.loads((out / "dlc/seed_1/noise.json").read_text())
    assert noise["estimator"] == "hoc" and noise["step"] == 1
    for arm in results["summary"]:
        score = results["scores"][arm]["1"]
        assert score["images"] == 4 and score["mIoU"] == pytest.approx(
            np.mean([value for value in score["IoU"].values() if value is not None]), abs=0.02)  # fmt: skip
        config = json.loads((out / arm / "seed_1/config.json").read_text())
        assert config["train_cfg"]["max_iters"] == (1 if arm == "pretrain" else 2)
    page = (out / "report.html").read_text()
    assert "<svg" in page and "data:image/png" in page and "validation mIoU" in page
    trained = [name for module, name in RAN if module == "scripts.train_segmentor"]
    assert sorted(trained) == ["dlc/seed_1", "joint/seed_1", *["pretrain/seed_1"] * 2, "random_drop/seed_1",
                               "real/seed_1", "recolour/seed_1", "rectified/seed_1", "unfiltered/seed_1"]  # fmt: skip
    assert "6 images generated, 6 kept" in page

    measure(workspace, out, "--arms", "joint,cutmix", *flags)  # goes on: only what is new runs
    assert {name for _, name in RAN} == {"cutmix/seed_1"}
    assert list(json.loads((out / "results.json").read_text())["summary"]) == ["real", "joint", "cutmix"]
    for arms, text in (("unfiltered", "6 images generated, not filtered"), ("cutmix", "")):  # filter/ is still there
        measure(workspace, out, "--arms", arms, *flags)
        page = (out / "report.html").read_text()
        assert not RAN and text in page and "data:image/png" not in page and ("images generated" in page) == bool(text)
    monkeypatch.setattr("post_processing.gain.report.draw_examples", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        measure(workspace, out, "--arms", "joint", *flags)
    assert list(json.loads((out / "results.json").read_text())["summary"]) == ["real", "joint"]
    with pytest.raises(UserError, match="were run with other settings"):
        measure(workspace, out, "--arms", "joint", *flags, "--steps", "5")

    random = np.random.default_rng(0)  # the filter of the tiny nets drops nothing: drop something, and its like again
    for path in sorted((out / "filter/masks").glob("*.png"))[:4]:
        mask = np.asarray(Image.open(path)).copy()
        mask[(random.random(mask.shape) < 0.6) & (mask > 1)] = 255
        Image.fromarray(mask).save(path)
    write_random_drop(make_plan(workspace, out))
    masks = {name: np.stack([np.asarray(Image.open(path)) for path in sorted((out / name).glob("*.png"))])
             for name in ("filter/masks", "random_drop/masks", "unfiltered/masks")}  # fmt: skip
    for label in range(5):
        counts = [int((mask == label).sum()) for mask in masks.values()]
        assert counts[0] == counts[1] <= counts[2]
    filtered, dropped, whole = masks.values()
    assert (filtered != dropped).any() and (dropped == 255).sum() == (filtered == 255).sum() > 500
    assert np.array_equal(dropped[dropped != 255], whole[dropped != 255])


def test_another_class_table_under_the_same_name_is_noticed_by_every_stage(workspace, tmp_path):
    table = tmp_path / "classes.yaml"
    found = []
    for text in ("", "# another\n"):
        table.write_text((ROOT / "configs/classes/mini.yaml").read_text() + text)
        plan = make_plan(workspace, tmp_path / "out", "--class_table", str(table), "--arms", "real,unfiltered",
                         "--ckpt", str(workspace / "tiny.safetensors"), "--mix_masks")  # fmt: skip
        found.append(StageRunner(plan.stages(), plan.outdir, []).settings)
    assert found[0].keys() == found[1].keys() >= {"sets", "masks", "synthesis", "unfiltered/seed_1"}
    assert all(found[0][name] != found[1][name] for name in found[0])


def test_arms_of_noise_correction_train_on_the_right_sets(workspace, tmp_path, capsys):
    out = tmp_path / "out"
    arms = "dlc,smooth,random_drop,dlc_filtered,self_training,unfiltered_self_training,dlc_self_training"
    measure(workspace, out, "--arms", arms, "--dry_run")
    plan = capsys.readouterr().out
    lines = {part.split()[0]: part for part in re.split(r"^open +", plan, flags=re.MULTILINE)[1:]}
    assert {"filter", "resample", "unfiltered", "random_drop", "targets"} <= set(lines)
    expected = {"dlc": ("unfiltered", "--noise_correction hoc"), "smooth": ("unfiltered", "--label_smoothing 0.1"),
                "random_drop": ("random_drop", "--synthetic_ratio 1.0"),
                "dlc_filtered": ("resample/set", "--noise_correction hoc")}  # fmt: skip
    for arm, (folder, flag) in expected.items():
        line = lines[f"{arm}/seed_1"]
        assert f"--synthetic_txt_file {out}/{folder}/train_set_items.json" in line and flag in line
        assert "--train_txt_file" in line and f"after sets, {folder.split('/')[0]}" in line
        assert ("--noise_correction" in line) == arm.startswith("dlc")
    assert "--synthetic_txt_file" not in lines["self_training/seed_1"]
    plain, corrected = (lines[f"{arm}_self_training/seed_1"] for arm in ("unfiltered", "dlc"))
    assert f"--synthetic_txt_file {out}/unfiltered/train_set_items.json" in plain
    assert "after sets, unfiltered, targets" in plain and "--noise_correction" not in plain
    same = plain.replace("unfiltered_self", "dlc_self")
    assert corrected.replace(" --noise_correction hoc", "").split()[1:] == same.split()[1:]
    for arm in ("self_training", "unfiltered_self_training", "dlc_self_training"):
        assert f"--target_txt_file {out}/targets/targets.json" in lines[f"{arm}/seed_1"]
    measure(workspace, out, "--arms", "self_training", "--dry_run")
    assert "synthesis" not in capsys.readouterr().out  # no generator is asked
    (tmp_path / "noise.json").write_text("{}")
    measure(workspace, out, "--arms", "dlc_audit", "--noise_matrix", tmp_path / "noise.json", "--dry_run")
    assert f"--noise_matrix {tmp_path}/noise.json" in capsys.readouterr().out
    with pytest.raises(UserError, match="--arms dlc_audit: expected together with --noise_matrix"):
        measure(workspace, out, "--arms", "dlc_audit")
    plan = make_plan(workspace, out)
    (out / "targets").mkdir(parents=True)
    write_targets(plan)
    assert len(list_targets(plan.manifests["targets"], workspace)) == 12


def test_settings_are_chosen_on_held_out_scenes(workspace, tmp_path, monkeypatch):
    """Scores of whole scenes that are not trained on, class means from folds, masks of the predicted class shares."""
    pytest.importorskip("mmseg")
    monkeypatch.setattr(StageRunner, "run_command", in_this_process)
    monkeypatch.setattr("ldm.generation.machine.stop_on_signals", contextlib.nullcontext)
    monkeypatch.chdir(ROOT)
    out = tmp_path / "out"
    measure(workspace, out, "--arms", "joint", "--held_out", "0.5", "--scene_regex", r"^scene(\d)_", "--match_shares",
            "--match_references", "--hardness_folds", "2")  # fmt: skip

    def scenes(name):
        rows = [json.loads(line) for line in (out / f"sets/{name}.json").read_text().splitlines()]
        return {re.match(r"scene\d", Path(row["target"]).name)[0] for row in rows}, len(rows)

    (real, count), (held_out, others) = scenes("real"), scenes("held_out")
    assert not real & held_out and count + others == 8 and count == others == 4
    for fold in (0, 1):
        (own, _), (rest, _) = scenes(f"fold_{fold}"), scenes(f"not_fold_{fold}")
        assert own | rest == real and not own & rest and own and rest
        command = (out / f"fold_{fold}/log.txt").read_text()
        assert f"not_fold_{fold}.json" in command
    assert (out / "filter/log.txt").read_text().count("--fold") == 2
    assert len(json.loads((out / "filter/masks/hardness.json").read_text())["fingerprint"]["folds"]) == 2
    results = json.loads((out / "results.json").read_text())
    assert results["scores"]["joint"]["1"]["images"] == 4
    assert "held-out training scenes" in (out / "report.html").read_text()
    assert len(list((out / "shares/masks").glob("*.png"))) == 12  # all images of --references
    for wrong, text in ((["--held_out", "1"], "--held_out 1.0"), (["--hardness_folds", "1"], "--hardness_folds 1"),
                        (["--hardness_folds", "9"], "images. Expected at least as many")):  # fmt: skip
        with pytest.raises(UserError, match=text):
            measure(workspace, tmp_path / "wrong", "--arms", "joint", *wrong)


def test_references_of_the_same_classes_are_drawn(workspace, tmp_path):
    pixels = np.array([[90, 10, 0], [0, 50, 50], [0, 0, 0], [20, 10, 70], [0, 0, 100]])
    mask = np.array([[2, 2, 2, 2, 255, 255], [2, 2, 2, 2, 2, 1]], np.uint8)  # shares 0, 0.1, 0.9
    assert nearest_references(mask, pixels, 3).tolist() == [4, 3, 1]
    assert nearest_references(mask, pixels, 9).tolist() == [4, 3, 1, 0, 2]

    plan = make_plan(workspace, tmp_path / "out", "--match_references", "--mix_masks")
    assert next(stage for stage in plan.stages() if stage.name == "masks").needs == ("sets", "shares")


def test_references_with_holes_are_left_out(workspace, tmp_path, caplog):
    folder = workspace / "holes"
    folder.mkdir()
    for name, black in (("a", 0), ("b", 1), ("c", 8)):
        image = np.full((20, 20, 3), 60, np.uint8)
        image[:black] = 0
        Image.fromarray(image).save(folder / f"{name}.png")
    plan = make_plan(workspace, tmp_path / "out", "--references", str(folder))
    with caplog.at_level("INFO"):
        assert list_references(plan) == ["holes/a.png", "holes/b.png"]
    assert "1 of 3 references are left out: more than 5 % of their pixels are black" in caplog.text
    for name in ("a", "b"):
        (folder / f"{name}.png").unlink()
    with pytest.raises(UserError, match="all 1 images are black"):
        list_references(plan)


def test_predicted_shares_are_those_of_the_references_at_hand(workspace, tmp_path):
    plan = make_plan(workspace, tmp_path / "out")
    link_references(plan)
    masks = tmp_path / "out/shares/masks"
    masks.mkdir()
    (masks / "000003.png").touch()
    link_references(plan)
    assert len(list((tmp_path / "out/shares/images").iterdir())) == 12 and list(masks.iterdir())  # a second run goes on
    added = workspace / "added"
    added.mkdir()
    Image.new("RGB", (8, 8), "white").save(added / "0.png")
    link_references(make_plan(workspace, tmp_path / "out", "--references", str(added)))
    assert not masks.exists()  # number 3 would be the mask of another image


def test_a_guide_of_ones_own_takes_the_place_of_the_segmentor(workspace, tmp_path):
    from scripts.measure_gain import check_passed_on

    guide = tmp_path / "guide.safetensors"
    guide.touch()
    plan = make_plan(workspace, tmp_path / "out", "--arms", "rectified", f"--rectify_args=--guide {guide}")
    check_passed_on(plan.args)
    stage = next(stage for stage in plan.stages() if stage.name == "rectified_synthesis")
    parsed = inference.build_parser().parse_args(stage.commands[0][stage.commands[0].index("inference.py") + 1 :])
    assert parsed.guide == [str(guide)] and str(guide) in stage.inputs


def test_drawn_masks_have_the_wanted_class_shares():
    random = np.random.default_rng(0)
    pixels = random.dirichlet([0.3, 0.3, 0.3, 0.3], 400) * 1000
    pixels[::10] = 0  # ignored everywhere
    wanted = np.array([0.6, 0.1, 0.25, 0.05])
    drawn = draw_shares(pixels, wanted, 60)
    assert len(set(drawn)) == 60 and pixels[drawn].any(1).all()
    mix = pixels[drawn].sum(0) / pixels[drawn].sum()
    assert np.abs(mix - wanted).sum() < 0.02 < np.abs(pixels.sum(0) / pixels.sum() - wanted).sum()
    assert drawn == draw_shares(pixels, wanted, 60)
    assert sorted(draw_shares(pixels, wanted, 360)) == list(np.flatnonzero(pixels.any(1)))


def test_generators_without_references_need_none(workspace, tmp_path):
    import inference
    from post_processing.gain.sets import write_masks
    from scripts.measure_gain import build_parser

    checkpoint = tmp_path / "pixel.safetensors"
    model = OmegaConf.create({"model": config("seg_guided_tiny")})
    save_safetensors(checkpoint, make("seg_guided_tiny").state_dict(), model)
    flags = ["--class_table", "mini", "--data_root", workspace, "--ckpt", checkpoint, "--num_masks", 3,
             "--num_per_mask", 2, "--inference_args=--num_steps 1 --device cpu --H 8 --W 8"]  # fmt: skip

    def sets(name, *extra):
        plan = Plan(build_parser().parse_args([str(flag) for flag in (*flags, "--outdir", tmp_path / name, *extra)]))
        write_masks(plan)
        rows = [json.loads(line) for line in Path(plan.manifests["painted"]).read_text().splitlines()]
        command = next(stage.commands[0] for stage in plan.stages() if stage.name == "synthesis")
        return rows, command[command.index("inference.py") + 1 :]

    without, command = sets("without")
    assert [list(row) for row in without] == [["source", "target", "prompt"]] * 3
    assert inference.main(list(command)) == 0
    assert len(list((tmp_path / "without/synthesis/images").iterdir())) == 6
    given, command = sets("given", "--references", workspace / "ref")
    assert [row.pop("ref_image")[:4] for row in given] == ["ref/"] * 6 and "--num_per_mask" not in command
    assert given[::2] == given[1::2] == without
    assert all(row["ref_image"].startswith("img/") for row in sets("others", "--real_fraction", "0.5")[0])
    with pytest.raises(UserError, match="4 images. Expected at least --num_per_mask 9"):
        sets("few", "--real_fraction", "0.5", "--num_per_mask", "9")


@pytest.mark.parametrize("references", ["", "data/a data/b.json"])
def test_the_script_passes_references_on_if_there_are_any(tmp_path, references):
    stand_in = tmp_path / "python"
    stand_in.write_text('#!/bin/sh\ncase $1 in scripts/measure_gain.py) printf "%s\\n" "$@" ;; esac\n')
    stand_in.chmod(0o755)
    environment = {"PYTHON": str(stand_in), "DATA_ROOT": "data", "CLASSES": "mini", "REFERENCES": references}
    command = ["sh", ROOT / "gain.sh", "--parallel", "2"]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True)
    words = done.stdout.splitlines()
    expected = ["--references", *references.split()] if references else []
    assert words[words.index("models/tisynth_mini.safetensors") + 1 :] == [
        *expected, "--outdir", "outputs/gain", "--parallel", "2",
    ]  # fmt: skip


def test_mistakes_are_found_before_anything_runs(workspace, tmp_path):
    from scripts.measure_gain import main

    with pytest.raises(UserError, match="--real_fraction 0.0.*--references nowhere: not found"):
        measure(workspace, tmp_path / "out", "--real_fraction", "0", "--references", "nowhere")
    with pytest.raises(SystemExit):
        measure(workspace, tmp_path / "out", "--arms", "magic")
    with pytest.raises(SystemExit):
        measure(workspace, tmp_path / "out", "--synthetic_ratio", "0")
    with pytest.raises(UserError, match="--steps 1: expected 2 or more for --arms pretrain"):
        measure(workspace, tmp_path / "out", "--arms", "pretrain", "--steps", "1")
    with pytest.raises(UserError, match="inference.py: unrecognized arguments: --scal 2; .*filter: .*--margn"):
        measure(workspace, tmp_path / "out", "--arms", "joint", "--inference_args", "--scal 2", "--filter_args",
                "--margn 2", "--dry_run")
    with pytest.raises(UserError, match="inference.py: argument --rectify_scale: .*'high'"):
        measure(workspace, tmp_path / "out", "--arms", "rectified", "--rectify_args", "--rectify_scale high")
    with pytest.raises(UserError, match="train_segmentor.py: unrecognized arguments: --threds=1"):
        measure(workspace, tmp_path / "out", "--train_args", "--threds=1")
    with pytest.raises(UserError, match="--inference_args: --outdir=x; --train_args: --max_steps. Expected only flags"):
        measure(workspace, tmp_path / "out", "--inference_args=--outdir=x", "--train_args=--max_steps 9")
    with pytest.raises(UserError, match="--inference_args: sampling: recolour_start is True"):
        measure(workspace, tmp_path / "out", "--inference_args=--recolour_start", "--dry_run")
    with pytest.raises(UserError, match="--references: none. .* the generator takes references"):
        main(["--classes", "mini", "--data_root", str(workspace), "--ckpt", str(workspace / "tiny.safetensors"),
              "--outdir", str(tmp_path / "out"), "--dry_run"])  # fmt: skip
    with pytest.raises(UserError, match="its classes are building, land, .*, those of --classes .*land_unpaved"):
        measure(workspace, tmp_path / "out", "--class_table", "dubai", "--arms", "unfiltered", "--dry_run")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="does not lie below --data_root"):
        (tmp_path / "elsewhere").mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / "elsewhere/a.png")
        measure(workspace, tmp_path / "out", "--references", tmp_path / "elsewhere")


def test_mixed_masks_are_painted_from_mixed_images(workspace, tmp_path, monkeypatch):
    pytest.importorskip("mmseg")
    monkeypatch.setattr(StageRunner, "run_command", in_this_process)
    monkeypatch.setattr("ldm.generation.machine.stop_on_signals", contextlib.nullcontext)
    monkeypatch.chdir(ROOT)
    out = tmp_path / "out"
    with pytest.raises(UserError, match="--arms mixed: expected --mix_masks"):
        measure(workspace, out, "--arms", "mixed")
    measure(workspace, out, "--arms", "unfiltered,mixed", "--mix_masks", "--inference_args",
            "--ddim_steps 2 --device cpu --strength 0.4")  # fmt: skip
    rows = [json.loads(line) for line in (out / "masks/synthesis.json").read_text().splitlines()]
    real = [json.loads(line) for line in (out / "sets/real.json").read_text().splitlines()]
    assert len(rows) == 6 and len({row["ref_image"] for row in rows}) > 1
    pairs = [tuple(np.asarray(Image.open(workspace / row[key])) for key in ("source", "target")) for row in real]
    mixed = 0
    for row in rows:
        mask, image = (np.asarray(Image.open(out / "masks" / row[key])) for key in ("source", "target"))
        assert mask.shape == image.shape[:2]
        original = workspace / row["ref_image"].removeprefix("references/")
        assert (out / "masks" / row["ref_image"]).read_bytes() == original.read_bytes()
        equal = [(old_mask == mask) & (old_image == image).all(-1) for old_mask, old_image in pairs]
        covered = [first | second for first in equal for second in equal]
        assert any(both.all() for both in covered)  # every pixel with its label comes from one of two pairs
        mixed += not any(one.all() for one in equal)
    assert mixed >= 2  # three masks: some meet themselves
    log = json.loads((out / "mixed/seed_1/config.json").read_text())
    assert str(out / "masks/synthesis.json") in json.dumps(log)
    run = json.loads((out / "synthesis/run.json").read_text())
    assert run["settings"]["strength"] == 0.4 and run["data_root"] == str(out / "masks")
    assert "6 images of mixed masks generated" in (out / "report.html").read_text()

    RAN.clear()  # other ways to generate do not train the baseline again
    with pytest.raises(UserError, match="unfiltered.*other settings|other settings"):
        measure(workspace, out, "--arms", "unfiltered", "--num_masks", "2")
    measure(workspace, out, "--arms", "unfiltered", "--num_masks", "2", "--overwrite")
    assert "real/seed_1" not in {name for _, name in RAN} and "unfiltered/seed_1" in {name for _, name in RAN}


def test_masks_with_rare_classes_are_preferred(tmp_path):
    from ldm.data.classes import ClassTable
    from ldm.data.manifest import Row
    from post_processing.gain.sets import choose_masks

    rows = []
    for number in range(100):
        mask = np.full((8, 8), 4 if number < 10 else 255 if number < 20 else 1, np.uint8)
        Image.fromarray(mask).save(tmp_path / f"{number}.png")
        rows.append(Row(number, number + 1, tmp_path / f"{number}.png", None, "", None, f"{number}.png"))
    table = ClassTable.load("mini")
    drawn = {balance: choose_masks(rows, table, 20, balance) for balance in (0, 1)}
    rare = {balance: sum(place < 10 for place in chosen) for balance, (_, chosen) in drawn.items()}
    assert rare[0] < 6 and rare[1] > 6  # of 10; 20 of 90 masks are drawn
    assert all(not 10 <= place < 20 for _, chosen in drawn.values() for place in chosen)  # nothing to generate there
    for number in range(20, 25):
        mask = np.kron([[1, 2], [3, 4]], np.ones((4, 4), int)).astype(np.uint8)
        Image.fromarray(mask).save(tmp_path / f"{number}.png")
    assert sum(20 <= place < 25 for place in choose_masks(rows, table, 20, 0.5)[1]) > 3  # by chance it is 1
    assert drawn[0][0][0] == "a satellite image of water"
    assert len(choose_masks(rows, table, None, 1)[1]) == 90
