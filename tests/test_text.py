"""Tokenizers and text encoders against the packages they must agree with, and against bad input."""

import json
from pathlib import Path

import pytest
import torch

from ldm.modules.text import ClipTextEncoder
from ldm.modules.tokenizer import CLIP_END, CLIP_START, build_clip_backend, byte_symbols, load_tokenizer

pytest.importorskip("tokenizers")

MINI_TOKENIZER = "configs/model/mini_tokenizer.json"
PROMPTS = [
    "",
    "a satellite image of irrigated field fish pond rural residential road",
    "A  Satellite\tIMAGE of\nurban-residential, it's 2,048 px (GSD 0.5m)!",
    "Zürich: forêt, Straße №5, 農地 と 川 🌲, naïve cafe\u0301 Ⅷ ١٢",
    "word " * 100,
]
TINY = {"vocab_size": 1024, "width": 16, "layers": 2, "heads": 2, "max_length": 12, "tokenizer": MINI_TOKENIZER}


def declare_torchvision_operators() -> list:
    """CPU torch beside the CUDA build of torchvision: its Python side imports once these two names exist."""
    if torch.version.cuda is not None:
        return []
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in ("nms(Tensor a, Tensor b, float c) -> Tensor", "qnms(Tensor a, Tensor b, float c) -> Tensor"):
        library.define(schema)
    return [library]  # the names vanish with the object


@pytest.fixture(scope="module")
def torchvision_operators():
    yield declare_torchvision_operators()


def write_clip_folder(folder: Path, encoder: ClipTextEncoder, rename, **config) -> None:
    from safetensors.torch import save_file

    state = {
        rename(name.removeprefix("transformer.text_model.")): tensor.clone()
        for name, tensor in encoder.state_dict().items()
    }
    state[rename("embeddings.position_ids")] = torch.arange(12)[None]
    save_file(state, folder / "model.safetensors")
    if config:
        (folder / "config.json").write_text(json.dumps(config))


def decode(tokenizer, row: torch.Tensor) -> str:
    """Text of a row between its start and end token."""
    ids = row.tolist()
    return tokenizer.backend.decode(ids[1 : ids.index(tokenizer.end_id)], skip_special_tokens=False)


def test_mini_tokenizer_gives_any_text_back():
    tokenizer = load_tokenizer(MINI_TOKENIZER, max_length=400)
    assert tokenizer.vocab_size == 1024
    texts = [*PROMPTS[:4], "\x00\x7f\u200b\U0010ffff", "<start> <end>", " two  spaces\r\n", "é vs e\u0301"]
    for text, row in zip(texts, tokenizer(texts), strict=True):
        assert decode(tokenizer, row) == text
    assert len(tokenizer.backend.encode(" residential", add_special_tokens=False).ids) == 1


def test_rows_have_start_end_and_padding():
    ids = load_tokenizer(MINI_TOKENIZER, max_length=8)(["", "water", "water " * 20])
    assert ids.shape == (3, 8) and ids.dtype == torch.int64
    assert ids[:, 0].eq(1022).all()
    assert ids[0, 1:].eq(1023).all()
    assert ids[2, -1] == 1023 and ids[2, :-1].ne(1023).all()
    padded = load_tokenizer(MINI_TOKENIZER, max_length=8, pad=0)([""])
    assert padded.tolist() == [[1022, 1023, 0, 0, 0, 0, 0, 0]]


def test_tokenizer_training_repeats_and_keeps_existing_files(tmp_path, monkeypatch, capsys):
    from demo.make import train_tokenizer as script

    corpus = script.make_corpus(["building", "low vegetation"], ["a satellite image of {classes}"], ["river", "sea"])
    text = script.train_tokenizer(corpus, 300)
    assert text == script.train_tokenizer(corpus, 300)
    (tmp_path / "tokenizer.json").write_text(text)
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"), max_length=60)
    assert (tokenizer.start_id, tokenizer.end_id, tokenizer.vocab_size) == (298, 299, 300)
    assert decode(tokenizer, tokenizer([PROMPTS[2]])[0]) == PROMPTS[2]
    with pytest.raises(ValueError, match="Add words"):
        script.train_tokenizer(corpus, 3000)
    monkeypatch.setattr("sys.argv", ["train_tokenizer.py", "--output", str(tmp_path / "tokenizer.json")])
    with pytest.raises(SystemExit) as stop:
        script.main()
    assert stop.value.code == 2 and "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "tokenizer.json").read_text() == text


def test_clip_backend_merges_by_priority():
    symbols = byte_symbols()
    assert len(set(symbols)) == 256
    merges = [("o", "a"), ("oa", "d</w>"), ("r", "oad</w>")]
    tokens = [*symbols, *(f"{s}</w>" for s in symbols), *map("".join, merges), CLIP_START, CLIP_END]
    vocab = {token: index for index, token in enumerate(tokens)}
    backend = build_clip_backend(vocab, merges)
    assert backend.encode("ROAD  oa's", add_special_tokens=False).tokens == ["road</w>", "o", "a</w>", "'", "s</w>"]


def test_clip_ids_equal_open_clip(torchvision_operators):
    open_clip = pytest.importorskip("open_clip")
    ours = load_tokenizer("clip", max_length=77, pad=0)
    assert torch.equal(ours(PROMPTS), open_clip.get_tokenizer("ViT-L-14")(PROMPTS))


def test_clip_outputs_equal_transformers(tmp_path, torchvision_operators):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 3}
    config = transformers.CLIPTextConfig(
        **sizes, num_attention_heads=4, max_position_embeddings=20, bos_token_id=298, eos_token_id=299
    )
    theirs = transformers.CLIPTextModel(config).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    theirs.save_pretrained(tmp_path)
    ours = ClipTextEncoder(vocab_size=300, width=32, layers=3, heads=4, max_length=20, weights_dir=str(tmp_path))
    ids = torch.randint(0, 300, (3, 20))
    with torch.no_grad():
        expected = theirs(input_ids=ids).last_hidden_state
    torch.testing.assert_close(ours(ids), expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="heads to match"):
        ClipTextEncoder(vocab_size=300, width=32, layers=3, heads=2, max_length=20, weights_dir=str(tmp_path))


class OpenClipBlock(torch.nn.Module):
    """A block of open_clip's text transformer out of torch's own layers, under its names."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        self.attn = torch.nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = torch.nn.ModuleDict({"c_fc": torch.nn.Linear(width, 4 * width),
                                        "c_proj": torch.nn.Linear(4 * width, width)})  # fmt: skip

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        mask = torch.full((hidden.shape[1],) * 2, -torch.inf).triu(1)
        normed = self.ln_1(hidden)
        hidden = hidden + self.attn(normed, normed, normed, attn_mask=mask, need_weights=False)[0]
        return hidden + self.mlp["c_proj"](torch.nn.functional.gelu(self.mlp["c_fc"](self.ln_2(hidden))))


def test_weights_of_open_clip_give_its_last_block_but_one(tmp_path):
    """SD2's text encoder in a file of its authors, by our CLIP: the last block is set aside, the norm is not."""
    from ldm.weights.checkpoint import open_checkpoint

    width, heads, count = 32, 4, 3
    blocks = torch.nn.ModuleList(OpenClipBlock(width, heads) for _ in range(count))
    norm, embedding = torch.nn.LayerNorm(width), torch.nn.Embedding(300, width)
    positions = torch.randn(20, width)
    for parameter in [*blocks.parameters(), *norm.parameters()]:
        torch.nn.init.normal_(parameter, std=0.3)
    weights = {f"transformer.resblocks.{name}": value for name, value in blocks.state_dict().items()}
    weights |= {"token_embedding.weight": embedding.weight, "positional_embedding": positions, "ln_final.weight":
                norm.weight, "ln_final.bias": norm.bias, "text_projection": torch.ones(4), "logit_scale": torch.ones(1)}
    path = tmp_path / "sd2.ckpt"
    torch.save({"state_dict": {f"cond_stage_model.model.{name}": value for name, value in weights.items()}}, path)
    opened = open_checkpoint(path)
    assert any("set aside 14: the last block and the rest of open_clip" in note for note in opened.notes)
    ours = ClipTextEncoder(300, width, count - 1, heads, max_length=20, activation="gelu", pad=0)
    ours.load_state_dict({name.removeprefix("cond_stage_model."): one.read() for name, one in opened.tensors.items()})
    ids = torch.randint(0, 300, (3, 20))
    with torch.no_grad():
        expected = norm(blocks[1](blocks[0](embedding(ids) + positions)))
        torch.testing.assert_close(ours(ids), expected, rtol=0, atol=1e-5)
    shapes = {name: one.shape for name, one in opened.tensors.items()}
    assert all(shapes[f"cond_stage_model.{name}"] == value.shape for name, value in ours.state_dict().items())


def test_encoder_is_causal_frozen_and_batch_independent():
    encoder = ClipTextEncoder(**TINY).train()
    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())
    context = encoder.encode(["a road", "a river in winter"])
    assert context.shape == (2, 12, 16) and not context.requires_grad
    torch.testing.assert_close(context[:1], encoder.encode(["a road"]))
    ids = torch.randint(0, 1024, (1, 12))
    changed = ids.clone()
    changed[0, 6] = (changed[0, 6] + 1) % 1024
    difference = (encoder(ids) - encoder(changed)).abs().amax(-1)[0]
    assert difference[:6].max() == 0 and difference[6:].min() > 0
    trained = ClipTextEncoder(**TINY, frozen=False)
    trained.encode(["a road"]).sum().backward()
    assert all(p.grad is not None for p in trained.parameters())


@pytest.mark.parametrize("prefix", ["", "text_model.", "cond_stage_model.transformer.text_model."])
def test_weights_folder_with_each_name_style(tmp_path, prefix):
    source = ClipTextEncoder(**TINY)
    write_clip_folder(tmp_path, source, lambda name: prefix + name)
    loaded = ClipTextEncoder(**TINY, weights_dir=str(tmp_path))
    for name, tensor in source.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_weights_of_a_whole_clip_model(tmp_path):
    source = ClipTextEncoder(**TINY)
    state = {f"text_model.{n.removeprefix('transformer.text_model.')}": t for n, t in source.state_dict().items()}
    state |= {"vision_model.encoder.layers.0.layer_norm1.weight": torch.ones(3), "logit_scale": torch.ones(())}
    torch.save(state, tmp_path / "pytorch_model.bin")
    loaded = ClipTextEncoder(**TINY, weights_dir=str(tmp_path))
    torch.testing.assert_close(loaded.encode(["road"]), source.encode(["road"]))


def test_weights_that_do_not_fit_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no weights in"):
        ClipTextEncoder(**TINY, weights_dir=str(tmp_path))
    write_clip_folder(tmp_path, ClipTextEncoder(**TINY), lambda name: name.replace("mlp.fc2", "mlp.other"))
    with pytest.raises(ValueError, match=r"Missing \(4\).*mlp\.fc2.*left over \(4\).*mlp\.other"):
        ClipTextEncoder(**TINY, weights_dir=str(tmp_path))
    write_clip_folder(tmp_path, ClipTextEncoder(**{**TINY, "layers": 3}), str)
    with pytest.raises(ValueError, match=r"left over \(16\)"):
        ClipTextEncoder(**TINY, weights_dir=str(tmp_path))
    write_clip_folder(tmp_path, ClipTextEncoder(**TINY), str, text_config={"hidden_act": "gelu"})
    with pytest.raises(ValueError, match="activation to match"):
        ClipTextEncoder(**TINY, weights_dir=str(tmp_path))


def test_bad_arguments_are_errors(tmp_path):
    with pytest.raises(ValueError, match="not divisible"):
        ClipTextEncoder(**{**TINY, "heads": 3})
    with pytest.raises(ValueError, match="quick_gelu"):
        ClipTextEncoder(**TINY, activation="relu")
    with pytest.raises(ValueError, match="Set vocab_size"):
        ClipTextEncoder(**{**TINY, "vocab_size": 1000}).encode(["road"])
    with pytest.raises(FileNotFoundError, match="file not found"):
        load_tokenizer("nowhere.json")
    with pytest.raises(FileNotFoundError, match="no CLIP tokenizer"):
        load_tokenizer("clip", tokenizer_dir=str(tmp_path))
    with pytest.raises(TypeError, match="list of strings"):
        load_tokenizer(MINI_TOKENIZER)("road")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match="not a tokenizers json file"):
        load_tokenizer(str(tmp_path / "bad.json"))


def test_sd15_names_and_shapes():
    with torch.device("meta"):
        encoder = ClipTextEncoder()
    shapes = {name: tuple(tensor.shape) for name, tensor in encoder.state_dict().items()}
    assert len(shapes) == 196 and sum(p.numel() for p in encoder.parameters()) == 123_060_480
    assert shapes["transformer.text_model.embeddings.position_embedding.weight"] == (77, 768)
    assert shapes["transformer.text_model.encoder.layers.11.mlp.fc1.weight"] == (3072, 768)
    assert shapes["transformer.text_model.final_layer_norm.bias"] == (768,)


LONG = "a satellite image of " + ", ".join(["road", "river", "building"] * 9)


def test_long_prompts_go_on_in_pieces():
    tokenizer = load_tokenizer(MINI_TOKENIZER, max_length=12)
    ids = tokenizer.split_words([LONG])[0]
    assert tokenizer.count_pieces([LONG, "road"]) == -(-len(ids) // 10) > 3
    assert tokenizer.count_pieces(["", "road"]) == 1
    rows = tokenizer([LONG, "road"], 4).unflatten(1, (4, 12))
    assert rows[0, :, 0].eq(1022).all() and rows[0, :, 11].eq(1023).all()
    assert rows[0, :, 1:11].flatten().tolist() == ids[:40]
    assert torch.equal(rows[1, 0], tokenizer(["road"])[0]) and torch.equal(rows[1, 1:], tokenizer([""]).expand(3, 12))

    encoder = ClipTextEncoder(**TINY, max_pieces=4)
    assert encoder.count_pieces([LONG]) == 4 and encoder.count_pieces(["road"]) == 1
    context = encoder.encode([LONG, "road"])
    assert context.shape == (2, 48, 16)
    for piece in range(4):  # each is what the encoder says of that piece alone
        torch.testing.assert_close(context[:, 12 * piece : 12 * (piece + 1)], encoder(rows[:, piece]))
    cut = ClipTextEncoder(**TINY)
    cut.load_state_dict(encoder.state_dict())
    assert torch.equal(cut.encode([LONG]), encoder.encode([LONG], 1)) and cut.encode([LONG]).shape == (1, 12, 16)
    with pytest.raises(ValueError, match="max_pieces is 0"):
        ClipTextEncoder(**TINY, max_pieces=0)


def test_what_is_cut_is_said():
    tokenizer = load_tokenizer(MINI_TOKENIZER, max_length=12)
    assert tokenizer.describe_cut(["", "a road"]) == ""
    text = tokenizer.describe_cut(["a road", LONG, "building " * 11], 1)
    ids = tokenizer.split_words([LONG])[0]
    assert text.startswith("2 of 3 different prompts are longer than the 10 tokens")
    assert f"has {len(ids)} tokens" in text
    assert "road, river, building" in text.partition("loses")[2] and "a satellite" not in text.partition("loses")[2]
    assert tokenizer.describe_cut([LONG], 10) == ""
    assert "1 of 1" in tokenizer.describe_cut(["农地和河流" * 9])
    for length in range(4, 14):  # limits amid the bytes of a character, too
        text = load_tokenizer(MINI_TOKENIZER, max_length=length).describe_cut(["农地和河流" * 9])
        lost = text.partition("loses ")[2].split("'")[1]
        assert lost and set(lost) <= set("农地和河流"), text
