"""Files of strangers run nothing: configs, whoever gives them, segmentors' configs, and pickles under any name."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

import inference
import train
from ldm.util import UserError, check_targets
from ldm.weights.files import read_file
from ldm.weights.load import read_model_config
from post_processing.segmentation.config import read_config
from post_processing.segmentation.segmentor import read_checkpoint

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "configs/model/tisynth_tiny.yaml"


class Touch:
    """Unpickled without care, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.path}",)


def run(*command: object, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **environment})  # fmt: skip


@pytest.mark.parametrize("where", ["outside", "inside", "data"])
def test_a_config_on_the_command_line_calls_nothing_foreign(where: str, tmp_path: Path, toy_data: Path):
    """The command that the issue reports, at both entry points, with the target at the top and nested."""
    node = {"target": "os.system", "params": {"command": f"touch {tmp_path}/called"}}
    config = OmegaConf.to_container(OmegaConf.load(TINY))
    if where == "outside":
        config["model"] = node | {"params": {"class_table": "mini", **node["params"]}}
    elif where == "inside":
        config["model"]["params"]["text_encoder"] = node
    else:
        config["data"] = {"params": {"batch_sampler": [node]}}
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
    torch.save({}, tmp_path / "x.ckpt")
    arguments = {"train.py": ["-b", toy_data / "train.yaml", tmp_path / "config.yaml", "--data_root", toy_data, "-p",
                              tmp_path / "run"],
                 "inference.py": ["--ckpt", tmp_path / "x.ckpt", "--config", tmp_path / "config.yaml", "--txt_file",
                                  toy_data / "val_set_items.json", "--outdir", tmp_path / "out"]}  # fmt: skip
    if where == "inside":
        for script, flags in arguments.items():
            done = run(script, *flags)
            assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
            assert "its config would call os.system. Expected" in done.stderr and "--allow_modules os" in done.stderr
    else:
        with pytest.raises(UserError, match="its config would call os.system. Expected"):
            train.main([str(part) for part in arguments["train.py"]])
    assert not (tmp_path / "called").exists()


@pytest.mark.parametrize(
    "target",
    ["os.system", "ldm.util.instantiate_from_config", "ldm.util.os", "ldm.data.manifest.write_manifest",
     "ldm.data.classes.ClassTable", "ldm.modules.text.nn", "ldm.modules.text.Callable", "ldm", "", "ldm..x", 7,
     "ldm/../evil.X", "ldmx.X", "torch.nn.Linear", "ldm.modules.blocks.nn.Linear", "ldm.weights.files.Tensor"],
)  # fmt: skip
def test_only_networks_and_data_modules_of_this_project_pass(target: object):
    with pytest.raises(UserError, match="would call|cannot be imported"):
        check_targets({"model": {"params": {"list": [{"deep": {"target": target}}]}}}, "file")


def test_the_configs_of_the_repository_pass_and_own_modules_need_the_flag(tmp_path: Path, monkeypatch):
    for path in [*ROOT.glob("configs/model/*.yaml"), *ROOT.glob("configs/train/*.yaml")]:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        check_targets(content, str(path))
    (tmp_path / "mine_own.py").write_text("from cldm.tisynth import TISynth\nclass Mine(TISynth):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    config = OmegaConf.load(TINY)
    config.model.target = "mine_own.Mine"
    OmegaConf.save(config, tmp_path / "own.yaml")
    torch.save({}, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match="add --allow_modules mine_own"):
        read_model_config(tmp_path / "x.ckpt", tmp_path / "own.yaml")
    found = read_model_config(tmp_path / "x.ckpt", tmp_path / "own.yaml", ["mine_own"])
    assert found["model"]["target"] == "mine_own.Mine"
    with pytest.raises(UserError, match="would call os.system"):  # the flag opens one module, not all
        check_targets({"a": found, "b": {"target": "os.system"}}, "file", ["mine_own"])
    with pytest.raises(UserError, match="would call mine_ownx"):
        check_targets({"target": "mine_ownx.X"}, "file", ["mine_own"])


@pytest.mark.parametrize("protocol", [0, 2, 4, "torch", "torch, old"])
def test_a_pickle_by_another_name_is_refused_in_a_sentence(protocol: object, tmp_path: Path):
    content = {"state_dict": {"a": torch.zeros(2)}, "x": Touch(tmp_path / "called")}
    path = tmp_path / "weights.safetensors"
    if isinstance(protocol, int):
        path.write_bytes(pickle.dumps(content, protocol=protocol))
    else:
        torch.save(content, path, _use_new_zipfile_serialization="old" not in protocol)
    for read in (read_file, read_checkpoint):
        with pytest.raises(UserError, match=str(path)) as error:
            read(path)
        text = str(error.value)
        assert "weights_only" not in text and "\n" not in text and len(text) < 500
    if protocol == "torch":
        assert "posix.system" in text
    with pytest.raises(UserError, match="^checkpoint .*weights.safetensors: "):
        inference.main(["--ckpt", str(path), "--txt_file", str(path), "--outdir", str(tmp_path / "out")])
    assert not (tmp_path / "called").exists()


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_torch_file_by_that_name_is_read(is_zip: bool, tmp_path: Path):
    torch.save({"state_dict": {"a": torch.arange(3.0)}}, tmp_path / "w.safetensors",
               _use_new_zipfile_serialization=is_zip)  # fmt: skip
    assert read_file(tmp_path / "w.safetensors").tensors["a"].read().tolist() == [0, 1, 2]
    assert read_checkpoint(tmp_path / "w.safetensors")["state_dict"]["a"].tolist() == [0, 1, 2]


RUNS = {
    "tag of yaml": ("c.yaml", "model: !!python/object/apply:os.system ['{touch}']\n", "not plain data"),
    "custom_imports": ("c.json", '{{"custom_imports": {{"imports": ["evil_module"]}}, "model": {{}}}}',
                       "custom_imports would be run"),
    "a base in Python": ("c.json", '{{"_base_": "./evil_module.py"}}', "_base_ evil_module.py would be run"),
    "a base of a base": ("c.json", '{{"_base_": ["./mid.yaml"]}}', "_base_ evil_module.py would be run"),
    "a function": ("c.json", '{{"model": {{"type": "os.system", "command": "{touch}"}}}}', "type os.system would be"),
    "nested": ("c.yml", 'model: {{type: EncoderDecoder, neck: [{{type: os.system, command: "{touch}"}}]}}',
               "type os.system would be"),
    "a function of a library": ("c.json", '{{"model": {{"type": "mmengine.load", "file": "x.pkl"}}}}',
                                "type mmengine.load would be"),
    "a path in a library": ("c.json", '{{"model": {{"type": "mmseg.apis.init_model"}}}}', "type mmseg.apis.init_model"),
    "an environment variable": ("c.json", '{{"model": {{"type": "{{{{$EVIL:os.system}}}}"}}}}', "would be imported"),
    "a tag behind a variable": ("c.yaml", 'model: {{{{$EVIL:!!python/object/apply:os.system ["{touch}"]}}}}\n',
                                "segmentor config"),
}  # fmt: skip


@pytest.mark.parametrize("kind", RUNS)
def test_a_segmentors_data_file_runs_nothing(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("mmseg")
    from post_processing.segmentation.segmentor import build_model

    touch = f"touch {tmp_path}/called"
    name, text, message = RUNS[kind]
    (tmp_path / name).write_text(text.format(touch=touch))
    (tmp_path / "evil_module.py").write_text(f"import os\nos.system({touch!r})\n")
    (tmp_path / "mid.yaml").write_text("_base_: evil_module.py\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=message):
        build_model(tmp_path / name)
    assert not (tmp_path / "called").exists() and "evil_module" not in sys.modules


def test_data_files_with_plain_bases_and_registered_types_are_read(tmp_path: Path):
    pytest.importorskip("mmseg")
    from post_processing.segmentation.segmentor import require_mmseg

    require_mmseg()
    (tmp_path / "base.yaml").write_text("model: {type: mmseg.EncoderDecoder, a: 1}\n")
    own = "post_processing.segmentation.mixing.RatioSampler"
    (tmp_path / "c.json").write_text(json.dumps({"_base_": "base.yaml", "model": {"a": 2}, "s": {"type": own}}))
    config = read_config(tmp_path / "c.json")
    assert (config.model.type, config.model.a, config.s.type) == ("mmseg.EncoderDecoder", 2, own)
    (tmp_path / "c.json").write_text(json.dumps({"_base_": "gone.json"}))
    with pytest.raises(FileNotFoundError, match="its _base_ .*gone.json is not there"):
        read_config(tmp_path / "c.json")
