"""What must never change: configs name what is there; shipped model, samplers and networks end where they did.

tests/data/golden.json was written by the code of revision 7fb62f5, for the solvers in float64, and for the shipped
model, which is younger, by that of 8b8774d.
"""

import json

import pytest
import torch
from denoisers import of_time, wavy
from omegaconf import OmegaConf
from test_savings import make_batch, make_method, make_noise
from tiny import ROOT

from ldm.diffusion.path import DiscretePath
from ldm.methods.base import Method
from ldm.sampling.guidance import make_denoiser
from ldm.sampling.modes import MODES, Sampling, make_sampling
from ldm.sampling.noise import SampleNoise, sample_noise
from ldm.sampling.samplers import sample
from ldm.util import locate
from ldm.weights.checkpoint import open_whole
from ldm.weights.load import build_skeleton, fill, load_method, read_model_config

GOLDEN = json.loads((ROOT / "tests/data/golden.json").read_text())
SETTINGS = {"exact": {}, "scales": {"hint_scale": 2.0, "reference_scale": 0.5},
            "turbo": {"solver": "unipc", "spacing": "trailing", "share_control": True, "reuse_every": 2,
                      "guidance_rescale": 0.7, "guidance_interval": [0.2, 0.9]}}  # fmt: skip


def test_every_config_builds_what_it_names():
    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        nodes = [OmegaConf.to_container(OmegaConf.load(path))]
        if "target" in (nodes[0].get("model") or {}):
            method = build_skeleton(nodes[0])
            assert isinstance(method, Method) and method.trainable_groups(), path
        while nodes:
            node = nodes.pop()
            nodes += node.values() if isinstance(node, dict) else node if isinstance(node, list) else []
            if isinstance(node, dict) and "target" in node and isinstance(node["target"], str) and "params" in node:
                assert callable(locate(node["target"])), (path, node["target"])


@pytest.mark.parametrize("name", GOLDEN["shipped"])
def test_the_shipped_model_generates_what_it_did(name: str, record_property):
    golden = GOLDEN["shipped"][name]
    config = read_model_config(ROOT / f"models/{name}.safetensors")
    method = load_method(ROOT / f"models/{name}.safetensors", config, "cpu")
    assert len(method.state_dict()) == golden["tensors"]
    assert method.own_sampling.to_dict() == golden["sampling"]  # as run.json of its runs has it
    random = torch.Generator().manual_seed(3)
    mask = torch.randint(0, 5, (1, 4, 4), generator=random).repeat_interleave(8, 1).repeat_interleave(8, 2)
    batch = {"mask": mask, "prompt": ["a satellite image of building, road"],
             "reference": torch.rand(1, 3, 32, 32, generator=random) * 2 - 1}  # fmt: skip
    noise = sample_noise(method.noise_shape(32, 32), [1])
    image = method.sample(batch, noise, make_sampling(method.own_sampling, {"num_steps": 4}))
    found = float((image.flatten()[::97] - torch.tensor(golden["image"])).abs().max())
    record_property("difference", found)
    assert found <= 1e-3 and image.std() > 0.1


def test_the_shipped_model_fits_the_config_that_trains_it_on():
    model = OmegaConf.to_container(OmegaConf.load(ROOT / "configs/model/tisynth_patch_mini.yaml"))
    account = fill(build_skeleton(model), open_whole(ROOT / "models/tisynth_mini.safetensors"))
    assert not (account.wrong or account.fresh or account.unexpected)


@pytest.mark.parametrize("case", GOLDEN["solvers"], ids=lambda case: json.dumps(case["sampling"])[1:-1])
def test_solvers_end_where_they_did(case: dict):
    kind, sampling = case["schedule"], Sampling(**case["sampling"])
    path = DiscretePath(kind=kind, **({"start": 1e-4, "end": 0.02} if kind == "linear" else {}))
    draw = SampleNoise([3, 4])
    drawn = lambda shape: draw(shape).double()  # noqa: E731
    noise, start = drawn((1, 2, 2)), sample_noise((1, 2, 2), [5, 6]).double()

    def predict(x, timestep):
        return torch.cat([wavy(x, timestep), torch.sin(x)], 1) if case["learned"] else wavy(x, timestep)

    denoise = make_denoiser(of_time(predict), case["prediction"], case["clip"], keep_variance=True)
    levels = path.levels(sampling.num_steps, sampling.spacing, sampling.end, sampling.strength)
    start = start if sampling.strength < 1 else None
    latent = sample(denoise, noise, levels, sampling.solver, sampling.eta, drawn, start)
    torch.testing.assert_close(latent.flatten(), torch.tensor(case["latent"]).double(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", GOLDEN["networks"])
def test_networks_end_where_they_did(name: str, record_property):
    config, label = name.split()
    method = make_method(config)
    sampling = make_sampling(MODES["exact"], {"num_steps": 4, "guidance_scale": 3.0, **SETTINGS[label]})
    latent = method.sample_latent(make_batch(), make_noise(method), sampling)
    expected = torch.tensor(GOLDEN["networks"][name])
    found = float((latent.flatten()[::7][:12] - expected).abs().max() / expected.std())
    record_property("difference", found)
    assert found <= 1e-4
