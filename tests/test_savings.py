"""Savings of sampling: exact ones change nothing, approximations leave out what they say and nothing else."""

from collections import Counter

import pytest
import torch
from tiny import model_params, randomize

from cldm.tisynth import TISynth
from ldm.methods.base import ConditionCache
from ldm.methods.diffusion import DiffusionMethod
from ldm.sampling.modes import Sampling, make_sampling

CONFIGS = ("tisynth_sd15_upstream", "tisynth_sd15", "tisynth_mini")
PROMPTS = ["a road", "water", "a road"]


def make_method(name, **changes):
    torch.manual_seed(0)
    changes = {"reference_augment": None, "sample_reference": False, **changes}
    method = randomize(TISynth(**model_params(name, **changes)), 0.15).eval()
    with torch.no_grad():  # random conditions say little: raise their voice
        for name, parameter in method.named_parameters():
            if any(part in name for part in (".attn2.", "input_hint_block", "zero_convs")):
                parameter *= 4
    return method


def make_batch(prompts=PROMPTS):
    generator = torch.Generator().manual_seed(3)
    count = len(prompts)
    return {"mask": torch.randint(0, 5, (count, 16, 16), generator=generator), "prompt": prompts,
            "reference": torch.rand(count, 3, 16, 16, generator=generator) * 2 - 1}  # fmt: skip


def make_noise(method, count=3):
    return torch.randn(count, *method.noise_shape(16, 16), generator=torch.Generator().manual_seed(1))


def count_calls(module, counts, name):
    """Note under a name how many samples a module sees in each call."""
    module.register_forward_hook(lambda _, args, __: counts.setdefault(name, []).append(len(args[0])))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    "settings",
    [{}, {"guidance_scale": 1.0}, {"guidance_interval": (0.2, 0.6)}, {"hint_scale": 2.0, "reference_scale": 0.5},
     {"solver": "unipc", "guidance_rescale": 0.7}],
)  # fmt: skip
def test_exact_savings_change_nothing(name, settings, record_property):
    method = make_method(name)
    sampling = make_sampling(Sampling(num_steps=4, guidance_scale=3.0), settings)
    noise = make_noise(method)
    saved = method.sample_latent(make_batch(), noise, sampling)
    method.prepare = lambda *arguments: DiffusionMethod.prepare(method, *arguments)  # predict_noise in every step
    plain = method.sample_latent(make_batch(), noise, sampling)
    found = float((saved - plain).abs().max() / plain.std())
    record_property("difference", found)
    assert plain.std() > 0.1 and found <= 1e-6


def test_plain_path_is_predict_noise_with_two_calls():
    """The other side of the comparison above, written without any of the code in question."""
    method = make_method("tisynth_sd15", guidance_drops=("prompt", "reference"))
    conditions, latent, timestep = method.conditions(make_batch()), make_noise(method), torch.full((3,), 400)
    null = {**conditions, "context": method.cond_stage_model.encode(["", "", ""]),
            "reference_latent": conditions["reference_latent"] * 0, "look": conditions["look"] * 0}  # fmt: skip
    expected = torch.cat([method.predict_noise(latent, timestep, **given) for given in (null, conditions)])
    predict = method.prepare([method.null_conditions(conditions), conditions])
    actual = predict(torch.cat([latent, latent]), timestep.repeat(2), 2)
    assert (actual - expected).abs().max() <= 1e-5 * expected.std()
    assert (expected[:3] - expected[3:]).abs().max() > 1e-2 * expected.std()


def test_stems_and_text_are_computed_once_for_all_steps():
    method, counts = make_method("tisynth_sd15"), {}
    count_calls(method.control_model.input_hint_block, counts, "hint stem")
    count_calls(method.ssl_stage_model.input_hint_block, counts, "reference stem")
    text_layers = [module.attn2 for module in method.modules() if hasattr(module, "attn2")]
    for layer in text_layers:
        count_calls(layer.to_k, counts, "text keys")
        count_calls(layer.to_v, counts, "text values")
    count_calls(method.model.diffusion_model.out, counts, "steps")
    method.sample_latent(make_batch(), make_noise(method), Sampling(num_steps=6, guidance_interval=(0.3, 1.0)))
    assert Counter(counts["steps"]) == {6: 4, 3: 2}  # guided and, below 300, not
    assert counts["hint stem"] == counts["reference stem"] == [3]  # both halves of guidance have the same
    assert counts["text keys"] == counts["text values"] == [6] * len(text_layers)


def test_a_mask_that_guidance_drops_has_a_stem_of_its_own():
    method, counts = make_method("tisynth_mini", guidance_drops=("prompt", "mask")), {}
    count_calls(method.control_model.input_hint_block, counts, "hint")
    count_calls(method.ssl_stage_model.input_hint_block, counts, "reference")
    method.sample_latent(make_batch(), make_noise(method), Sampling(num_steps=2))
    assert counts == {"hint": [3, 3], "reference": [3]}


def test_shared_control_runs_once_where_the_halves_have_the_same_condition():
    sampling, shared = Sampling(num_steps=2), Sampling(num_steps=2, method={"share_control": True})
    for drops, expected in ((("prompt",), {"mask": [3, 3], "reference": [3, 3]}),
                            (("prompt", "mask"), {"mask": [6, 6], "reference": [3, 3]})):  # fmt: skip
        method, counts = make_method("tisynth_sd15", guidance_drops=drops), {}
        count_calls(method.control_model.middle_block, counts, "mask")
        count_calls(method.ssl_stage_model.middle_block, counts, "reference")
        result = method.sample_latent(make_batch(), make_noise(method), shared)
        assert counts == expected, drops
        plain = method.sample_latent(make_batch(), make_noise(method), sampling)
        assert not torch.equal(result, plain)  # an approximation
        same_text = make_batch([""] * 3)  # of which nothing is left when the text of both halves is the same
        method.guidance_drops = tuple(drop for drop in method.guidance_drops if drop == "prompt")
        torch.testing.assert_close(method.sample_latent(same_text, make_noise(method), shared),
                                   method.sample_latent(same_text, make_noise(method), sampling),
                                   rtol=1e-4, atol=1e-4)  # fmt: skip


def test_encoder_and_control_run_at_every_nth_step():
    method, counts = make_method("tisynth_sd15"), {}
    for name, module in (("mask", method.control_model), ("reference", method.ssl_stage_model),
                         ("encoder", method.model.diffusion_model)):  # fmt: skip
        count_calls(module.input_blocks[1], counts, name)
    count_calls(method.model.diffusion_model.out, counts, "decoder")
    method.sample_latent(make_batch(), make_noise(method), Sampling(num_steps=5, method={"reuse_every": 2}))
    assert counts.pop("decoder") == [6] * 5
    assert counts == {name: [6] * 3 for name in ("mask", "reference", "encoder")}
    # Unguided first (branches of 3), guided from 600 on: the kept features have no unconditional half.
    counts.clear()
    sampling = Sampling(num_steps=4, guidance_interval=(0, 0.6), method={"reuse_every": 4})
    method.sample_latent(make_batch(), make_noise(method), sampling)
    assert counts["encoder"] == [3, 6]


def test_a_step_that_reuses_features_knows_its_own_timestep_only():
    method = make_method("tisynth_sd15")
    conditions = method.conditions(make_batch())
    latents = [make_noise(method) * factor for factor in (1.0, 0.5)]
    late, later = torch.full((3,), 400), torch.full((3,), 300)

    def second(latent, timestep, reuse_every):
        predict = method.prepare([conditions], Sampling(method={"reuse_every": reuse_every}))
        predict(latents[0], late, 1)
        return predict(latent, timestep, 1)

    assert torch.equal(second(latents[0], later, 2), second(latents[1], later, 2))
    assert not torch.equal(second(latents[0], later, 2), second(latents[0], late, 2))
    plain = method.predict_noise(latents[1], later, **conditions)
    torch.testing.assert_close(second(latents[1], later, 1), plain, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(second(latents[0], late, 2), method.predict_noise(latents[0], late, **conditions),
                               rtol=1e-5, atol=1e-6)  # fmt: skip


def test_prompts_and_references_are_encoded_once_in_a_run():
    method, counts = make_method("tisynth_sd15"), {}
    batch = {**make_batch(), "reference_key": ["a", "b", "a"]}
    batch["reference"][2] = batch["reference"][0]
    noise, sampling = make_noise(method), Sampling(num_steps=2)
    expected = method.sample(batch, noise, sampling)
    count_calls(method.cond_stage_model, counts, "text")
    count_calls(method.first_stage_model.encoder, counts, "reference")
    method.condition_cache = ConditionCache()
    for _ in range(2):
        actual = method.sample(batch, noise, sampling)
        assert (actual - expected).abs().max() <= 1e-5
    assert counts == {"text": [1, 1, 1], "reference": [1, 1]}  # two prompts and the empty one, two references
    method.sample({**batch, "prompt": ["sea", "water", "sea"], "reference_key": ["a", "b", "c"]}, noise, sampling)
    assert counts == {"text": [1] * 4, "reference": [1] * 3}
    without_keys = {key: value for key, value in batch.items() if key != "reference_key"}
    method.sample(without_keys, noise, sampling)
    assert counts["reference"] == [1, 1, 1, 3]


def test_cache_never_serves_what_must_be_drawn_or_trained():
    method = make_method("tisynth_sd15", sample_reference=True)
    method.condition_cache = ConditionCache()
    batch = {**make_batch(), "reference_key": ["a", "b", "c"]}
    first, second = (method.conditions(batch)["reference_latent"] for _ in range(2))
    assert not torch.equal(first, second)
    method.train()
    method.conditions(batch)
    assert not any(key[0] == "reference" for key in method.condition_cache.tensors)


def test_cache_forgets_the_oldest():
    cache, made = ConditionCache(limit=2), []

    def get(key):
        return cache.get(key, lambda: made.append(key) or torch.zeros(1))

    for key in "abacab":
        get(key)
    assert made == list("abcb")


@pytest.mark.parametrize(("name", "value"), [("reuse_every", 0), ("hint_scale", 0.0), ("hint_scale", float("nan")),
                                             ("reference_scale", float("inf"))])  # fmt: skip
def test_impossible_settings_of_the_method_are_named(name, value):
    with pytest.raises(ValueError, match=f"sampling: {name} is {value}"):
        make_method("tisynth_mini").check(Sampling(method={name: value}))
    with pytest.raises(ValueError, match="TISynth has no hint_scales. Expected of these"):
        make_method("tisynth_mini").check(Sampling(method={"hint_scales": 2.0}))


def test_a_models_guidance_scales_are_those_of_every_mode():
    import argparse

    from ldm.sampling.modes import MODES, add_sampling_flags, choose_sampling, make_sampling

    parser = argparse.ArgumentParser()
    add_sampling_flags(parser.add_argument_group("sampling"))
    own = make_sampling(MODES["exact"], {"guidance_scale": 4.0, "reference_scale": 3.0})

    def choose(*words):
        return choose_sampling(parser.parse_args(words), own)

    for words in ((), ("--mode", "fast"), ("--mode", "turbo"), ("--mode", "exact")):
        found = choose(*words)
        assert (found.guidance_scale, found.method["reference_scale"]) == (4.0, 3.0)
    assert choose().solver == "unipc" and choose("--mode", "turbo").method["share_control"]  # scales alone: no own mode
    assert choose("--reference_scale", "1.5").method["reference_scale"] == 1.5
