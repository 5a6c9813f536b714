"""Weights of flash-linear-attention's GLAForCausalLM: the same logits here, and back with the same bits.

`fla_gla.json` is what FLA 0.6.0's `save_pretrained` wrote for small models: each `config.json`, and names and shapes of
the weights. Where FLA is installed the list is held against it, and on a GPU the logits against its own.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import gla_ablate
from gla_ablate.cli import main
from gla_ablate.config import Config, ModelConfig, to_dict, write_config
from gla_ablate.errors import ConfigError
from gla_ablate.export import write_weights
from gla_ablate.interop import from_fla, to_fla
from gla_ablate.interop.fla import ffn_of
from gla_ablate.loading import own_weights
from gla_ablate.model import build_model, check_model
from gla_ablate.model.shapes import ffn_width

STORED: dict[str, Any] = json.loads((Path(__file__).parent / "fla_gla.json").read_text())
FLA = importlib.util.find_spec("fla") is not None and importlib.util.find_spec("transformers") is not None
needs_fla = pytest.mark.skipif(not FLA, reason="needs flash-linear-attention and transformers")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="FLA's kernels need a GPU")

Weights = dict[str, torch.Tensor]


def drawn(shapes: dict[str, list[int]]) -> Weights:
    """Random weights, none of them at a value (a norm of ones, a bias of zeros) behind which a mistake could hide."""
    random = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=random) * 0.3 + (len(shape) == 1) for name, shape in shapes.items()}


def theirs(folder: Path, case: str = "plain", weights: Weights | None = None, **changes: Any) -> Path:
    """A folder of FLA's, with `changes` to its config."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(STORED[case]["config"] | changes))
    save_file(drawn(STORED[case]["weights"]) if weights is None else weights, folder / "model.safetensors")
    return folder


def logits_of_fla(config: dict[str, Any], weights: Weights, tokens: torch.Tensor) -> torch.Tensor:
    """FLA's network in plain PyTorch, read off its modules, the recurrence token by token."""

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + config["norm_eps"]) * weights[f"{name}.weight"]

    def convolved(name: str, x: torch.Tensor) -> torch.Tensor:
        if not config["use_short_conv"]:
            return x
        kernel = weights[f"{name}.weight"]  # [C, 1, W]
        return F.silu(F.conv1d(F.pad(x.mT, (kernel.shape[-1] - 1, 0)), kernel, groups=len(kernel)).mT)

    def gla(at: str, x: torch.Tensor) -> torch.Tensor:
        H = config["num_heads"]
        q, k, v = (convolved(f"{at}.{n}_conv1d", linear(f"{at}.{n}_proj", x)).unflatten(-1, (H, -1)) for n in "qkv")
        decay = F.logsigmoid(linear(f"{at}.gk_proj.1", linear(f"{at}.gk_proj.0", x))) / 16
        decay = decay.unflatten(-1, (H, -1)).exp()  # [B, T, H, K]
        state, outputs = 0, []
        for t in range(x.shape[1]):
            state = decay[:, t, ..., None] * state + k[:, t, ..., None] * v[:, t, ..., None, :]  # [B, H, K, V]
            outputs.append((q[:, t, ..., None] * state).sum(-2) * q.shape[-1] ** -0.5)
        o = norm(f"{at}.g_norm_swish_gate" if config["fuse_norm"] else f"{at}.g_norm", torch.stack(outputs, 1))
        return linear(f"{at}.o_proj", o.flatten(-2) * F.silu(linear(f"{at}.g_proj", x)))

    def softmax(at: str, x: torch.Tensor) -> torch.Tensor:
        H, T = config["attn"]["num_heads"], x.shape[1]
        q, k, v = (linear(f"{at}.{n}_proj", x).unflatten(-1, (H, -1)).transpose(1, 2) for n in "qkv")
        D = q.shape[-1]
        angle = torch.arange(T)[:, None] * 10_000.0 ** (-torch.arange(0, D, 2, dtype=x.dtype) / D)
        cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)  # the halves of a head are the pairs
        q, k = (y * cos + torch.cat([-y[..., D // 2 :], y[..., : D // 2]], -1) * sin for y in (q, k))
        back = torch.arange(T)[:, None] - torch.arange(T)
        seen = (back >= 0) & (back < config["attn"]["window_size"])
        p = (q @ k.mT * D**-0.5).masked_fill(~seen, -torch.inf).softmax(-1)
        return linear(f"{at}.o_proj", (p @ v).transpose(1, 2).flatten(-2))

    x = weights["model.embeddings.weight"][tokens]
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        mixer = softmax if config["attn"] and layer in config["attn"]["layers"] else gla
        x = x + mixer(f"{at}.attn", norm(f"{at}.attn_norm", x))
        y = norm(f"{at}.mlp_norm", x)
        x = x + linear(f"{at}.mlp.down_proj", F.silu(linear(f"{at}.mlp.gate_proj", y)) * linear(f"{at}.mlp.up_proj", y))
    head = "model.embeddings" if config["tie_word_embeddings"] else "lm_head"
    return linear(head, norm("model.norm", x))


@pytest.mark.parametrize("case", STORED)
def test_a_model_of_fla_gives_the_same_logits_here(case, tmp_path):
    model = from_fla(theirs(tmp_path / "theirs", case))
    assert not model.training and all(x.dtype == torch.float32 for x in model.parameters())
    tokens = torch.randint(0, 50, (2, 40), generator=torch.Generator().manual_seed(0))
    weights = {name: x.double() for name, x in drawn(STORED[case]["weights"]).items()}
    want = logits_of_fla(STORED[case]["config"], weights, tokens)
    assert want.abs().max() > 1
    model = model.double()  # but for the gate, which is fp32 always
    torch.testing.assert_close(model(tokens), want, rtol=0, atol=1e-5)
    with torch.no_grad():  # where a norm's weight is on the other side of a product
        torch.testing.assert_close(model(tokens), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", STORED)
def test_a_model_goes_back_with_the_same_bits_under_the_same_names(case, tmp_path):
    to_fla(from_fla(theirs(tmp_path / "theirs", case)), tmp_path / "back")
    want = drawn(STORED[case]["weights"])
    if not STORED[case]["config"]["fuse_norm"]:  # which is written as it is by default: the same network
        want = {name.replace(".g_norm.", ".g_norm_swish_gate."): x for name, x in want.items()}
    got = load_file(tmp_path / "back" / "model.safetensors")
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)
    given, written = STORED[case]["config"], json.loads((tmp_path / "back" / "config.json").read_text())
    free = {"fuse_norm", "bos_token_id", "eos_token_id", "intermediate_size", "conv_size"}
    assert {key: value for key, value in written.items() if given[key] != value}.keys() <= free
    again = from_fla(tmp_path / "back")
    assert again.config == from_fla(tmp_path / "theirs").config


@needs_fla
@pytest.mark.parametrize("case", STORED)
def test_the_stored_names_and_shapes_are_those_of_fla(case, tmp_path):
    if case == "hybrid" and importlib.util.find_spec("flash_attn") is None:
        pytest.skip("FLA's softmax layers need flash-attn")
    from fla.models import GLAConfig, GLAForCausalLM

    GLAForCausalLM(GLAConfig(**STORED[case]["made_with"])).save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert {name: list(x.shape) for name, x in saved.items()} == STORED[case]["weights"]


@needs_fla
@needs_gpu
@pytest.mark.parametrize("tokens, tolerance", [(64, 1e-4), (300, 1e-2)])  # FLA: a recurrence; chunks, in TF32
@pytest.mark.parametrize("case", [case for case in STORED if case != "hybrid"])
def test_logits_are_those_of_flas_own_kernels_both_ways(case, tokens, tolerance, tmp_path):
    from fla.models import GLAForCausalLM

    def read(folder: Path) -> torch.nn.Module:
        return GLAForCausalLM.from_pretrained(folder, dtype=torch.float32).cuda().eval()

    given = torch.randint(0, 50, (2, tokens), generator=torch.Generator().manual_seed(0)).cuda()
    first = read(theirs(tmp_path / "theirs", case))
    here = from_fla(tmp_path / "theirs").cuda()
    live = from_fla(first).cuda()
    second = read(to_fla(here, tmp_path / "back"))
    with torch.no_grad():
        want, ours = first(given).logits, here(given)
        assert (ours - want).abs().max() <= tolerance * want.abs().max()
        assert torch.equal(live(given), ours)
        # What was unfused goes back fused: another kernel's rounding, which products in TF32 amplify.
        back = 1e-5 if STORED[case]["config"]["fuse_norm"] else tolerance
        assert (second(given).logits - want).abs().max() <= back * want.abs().max()


@pytest.mark.parametrize("dim", [1, 3, 48, 77, 1000, 2048])
def test_every_width_of_a_swiglu_has_a_config_here(dim):
    for width in (*range(1, 400), 2730, 5461, 5632, 999 * dim):
        keys = ffn_of({"hidden_size": dim, "intermediate_size": width}) if width <= 1000 * dim else None
        assert keys is None or ffn_width(ModelConfig(dim=dim, **keys)) == width


def test_what_a_config_leaves_out_is_as_fla_has_it_by_default(tmp_path):
    folder = theirs(tmp_path / "theirs")
    small = {"model_type": "gla", "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2, "vocab_size": 50}
    (folder / "config.json").write_text(json.dumps(small | {"intermediate_size": 40}))
    config = from_fla(folder).config
    assert (config.norm_eps, config.expand_k, config.tie_embeddings, config.short_conv) == (1e-6, 0.5, False, 0)
    (folder / "config.json").write_text(json.dumps(small))
    with pytest.raises(ConfigError, match=r"mlp.gate_proj.weight is \[40, 32\], takes \[256, 32\] with this config"):
        from_fla(folder)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "retnet"}, "model_type: got 'retnet', takes 'gla'"),
        ({"feature_map": "relu"}, 'feature_map: got "relu", takes null'),
        ({"clamp_min": -1.0}, "clamp_min: got -1.0, takes null"),
        ({"use_output_gate": False}, "use_output_gate: got false, takes true"),
        ({"hidden_act": "powlu"}, 'hidden_act: got "powlu", takes "swish"'),
        ({"elementwise_affine": False}, "elementwise_affine: got false, takes true"),
        ({"use_gk": False}, "use_gk: got false, takes true"),
        ({"use_gv": True}, "use_gv: got true, takes false"),
        ({"attnres_block_size": 2}, "attnres_block_size: got 2, takes null"),
        ({"num_kv_heads": 1}, "num_kv_heads: got 1, takes null or num_heads, 2"),
        ({"num_heads": 3}, "model.heads: got 3, takes a divisor of 16"),
        ({"num_heads": "2"}, "num_heads: got '2', takes a whole number from 1"),
        ({"vocab_size": 0}, "vocab_size: got 0, takes a whole number from 1"),
        ({"hidden_ratio": "wide", "intermediate_size": None}, "hidden_ratio: got 'wide', takes a number above 0"),
        ({"norm_eps": 0}, "model.norm_eps: got 0"),
        ({"attn": [{"layers": [0], "num_heads": 2}, {"layers": [1], "num_heads": 4}]}, "attn: got"),
        ({"attn": {"layers": 1, "num_heads": 2}}, "attn: got .* takes a mapping with layers, a list, and num_heads"),
        ({"attn": {"layers": [1], "num_heads": 4, "num_kv_heads": 2}}, "attn.num_kv_heads: got 2, takes 4"),
        ({"attn": {"layers": [1], "num_heads": 4, "qkv_bias": True}}, "attn.qkv_bias: got true, takes false"),
        ({"attn": {"layers": [1], "num_heads": 4, "rope_theta": 5e5}}, "attn.rope_theta: got 500000.0, takes 10000.0"),
        ({"use_short_conv": True}, "weights: model.layers.0.attn.k_conv1d.weight is missing"),
        ({"num_hidden_layers": 1}, "weights: model.layers.1.attn.g_norm_swish_gate.weight is of no GLAForCausalLM"),
        ({"vocab_size": 51}, r"model.embeddings.weight is \[50, 32\], takes \[51, 32\] with this config"),
    ],
)  # fmt: skip
def test_a_config_of_another_network_is_refused_with_its_key(changes, message, tmp_path):
    with pytest.raises(ConfigError, match=message) as error:
        from_fla(theirs(tmp_path / "theirs", **changes))
    assert str(tmp_path / "theirs" / "config.json") in str(error.value)


def test_weights_that_are_not_numbers_are_refused(tmp_path):
    weights = drawn(STORED["plain"]["weights"])
    weights["lm_head.weight"] = weights["lm_head.weight"].to(torch.int8)
    with pytest.raises(ConfigError, match=r"lm_head.weight is of torch.int8, takes floating-point numbers"):
        from_fla(theirs(tmp_path / "theirs", weights=weights))


def test_weights_in_16_bits_and_in_several_files_are_read(tmp_path):
    weights = {name: x.bfloat16() for name, x in drawn(STORED["plain"]["weights"]).items()}
    whole = from_fla(theirs(tmp_path / "whole", weights=weights))
    parts = theirs(tmp_path / "parts")
    (parts / "model.safetensors").unlink()
    files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(weights)}
    for file in set(files.values()):
        save_file({name: x for name, x in weights.items() if files[name] == file}, parts / file)
    (parts / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    read = from_fla(parts).state_dict()
    assert all(torch.equal(x, read[name]) for name, x in whole.state_dict().items())
    assert torch.equal(read["head.weight"], weights["lm_head.weight"].float())


def test_a_folder_without_a_model_of_fla_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="nowhere: no such folder"):
        from_fla(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"no config.json here; takes one that GLAForCausalLM.save_pretrained wrote"):
        from_fla(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config.json: no JSON"):
        from_fla(tmp_path)
    theirs(tmp_path)
    damaged = (tmp_path / "model.safetensors").read_bytes()[:-5]
    (tmp_path / "model.safetensors").write_bytes(damaged)
    with pytest.raises(ConfigError, match=r"model.safetensors: can't be read"):
        from_fla(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"no model.safetensors here, nor an index of several"):
        from_fla(tmp_path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"gate": {"name": "fixed_decay"}}, "model.gate.name: got 'fixed_decay', takes 'data_dependent'"),
        ({"gate": {"name": "data_dependent", "rank": 8}}, "model.gate.rank: got 8, takes 16"),
        ({"gate": {"name": "data_dependent", "tau": 8.0}}, "model.gate.tau: got 8.0, takes 16.0"),
        ({"rope": True}, "model.rope: got true, takes false"),
        ({"mixer": "softmax"}, "model.mixer: got softmax alone, takes a layer of gla"),
    ],
)  # fmt: skip
def test_a_model_that_fla_cannot_have_is_refused_and_nothing_written(changes, message, tmp_path):
    model = build_model(check_model(ModelConfig(dim=32, **changes)), 50)
    with pytest.raises(ConfigError, match=message):
        to_fla(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_only_a_gla_of_fla_is_written_over(tmp_path):
    model = build_model(check_model(ModelConfig(dim=32)), 50)
    folder = to_fla(model, tmp_path / "new")
    to_fla(model, folder, separator=3)
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == 3
    (folder / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match=r"has a config.json that is of no GLAForCausalLM; name another folder"):
        to_fla(model, folder)
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"has a model.safetensors that is of no GLAForCausalLM"):
        to_fla(model, folder)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file: file exists"):
        to_fla(model, tmp_path / "file")


def test_the_command_writes_a_trained_model_for_fla(tmp_path, capsys):
    model = check_model(ModelConfig(dim=32, norm_eps=1e-3, tie_embeddings=True))
    config = Config(model=model, data={"name": "stdlib", "seq_len": 32, "batch_size": 4})
    trained = build_model(model, 256, seed=5)
    told = {"format": "pt", "config": json.dumps(to_dict(config)), "step": "1"}
    folder = tmp_path / "trained"
    folder.mkdir()
    write_weights(own_weights(trained), told, folder / "model.safetensors")
    write_config(config, folder / "config.yaml")
    assert main(["--export", str(folder), "--format", "fla"]) == 0
    assert str(folder / "fla" / "model.safetensors") in capsys.readouterr().out
    assert json.loads((folder / "fla" / "config.json").read_text())["bos_token_id"] == 0  # the byte between documents
    back, want = from_fla(folder / "fla").state_dict(), gla_ablate.load(folder).state_dict()
    assert back.keys() == want.keys() and all(torch.equal(back[name], want[name]) for name in want)
    assert main(["--export", str(folder), "--format", "fla", "--to", str(tmp_path / "there")]) == 0
    assert (tmp_path / "there" / "config.json").exists()
    assert main(["--export", str(folder), "--format", "hf"]) == 2
    assert "argument --format: got 'hf', takes gla_ablate or fla" in capsys.readouterr().err
    shutil.rmtree(folder / "fla")
    (folder / "fla").symlink_to(tmp_path / "there")
    assert main(["--export", str(folder), "--format", "fla"]) == 2
    assert "is a symbolic link" in capsys.readouterr().err
