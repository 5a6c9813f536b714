"""Weights of flash-linear-attention's `GLAForCausalLM` as a model of this package, and back (written for FLA 0.6.0).

Both are the same network: every matrix has its counterpart, in the same orientation, and nothing is permuted. `NAMES`
says what is called what; `MUST` which settings of FLA's have no counterpart here. FLA itself isn't needed: a folder is
a `config.json` and safetensors.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gla_ablate.config import ModelConfig, located, resolve_model
from gla_ablate.data.packing import SEPARATOR
from gla_ablate.errors import ConfigError
from gla_ablate.export import check_link, write_weights
from gla_ablate.interop.fla_files import SETTINGS, WEIGHTS, check_free, read_settings, read_weights
from gla_ablate.loading import open_folder, own_weights
from gla_ablate.model import LanguageModel, build_model
from gla_ablate.model.kinds import mixers, softmax_heads
from gla_ablate.model.shapes import ffn_width
from gla_ablate.status import write_json

# Ours → FLA's. A layer's stand under `blocks.N.` here and `model.layers.N.` there.
NAMES = {
    "embedding.weight": "model.embeddings.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
LAYER = {
    "mixer_norm.weight": "attn_norm.weight",
    "mixer.q_proj.weight": "attn.q_proj.weight",
    "mixer.k_proj.weight": "attn.k_proj.weight",
    "mixer.v_proj.weight": "attn.v_proj.weight",
    "mixer.q_conv.weight": "attn.q_conv1d.weight",  # [channels, W] here, [channels, 1, W] there, as of the next two
    "mixer.k_conv.weight": "attn.k_conv1d.weight",
    "mixer.v_conv.weight": "attn.v_conv1d.weight",
    "mixer.gate.down.weight": "attn.gk_proj.0.weight",
    "mixer.gate.up.weight": "attn.gk_proj.1.weight",
    "mixer.gate.up.bias": "attn.gk_proj.1.bias",
    "mixer.norm.weight": "attn.g_norm_swish_gate.weight",  # attn.g_norm.weight in a model with fuse_norm: false
    "mixer.output_gate_proj.weight": "attn.g_proj.weight",
    "mixer.out_proj.weight": "attn.o_proj.weight",
    "ffn_norm.weight": "mlp_norm.weight",
    "ffn.swish_proj.weight": "mlp.gate_proj.weight",
    "ffn.up_proj.weight": "mlp.up_proj.weight",
    "ffn.down_proj.weight": "mlp.down_proj.weight",
}

# `GLAConfig`'s defaults, which a config.json may leave out.
DEFAULTS: dict[str, Any] = {
    "hidden_size": 2048, "num_hidden_layers": 24, "num_heads": 4, "expand_k": 0.5, "expand_v": 1.0, "hidden_ratio": 4,
    "intermediate_size": None, "norm_eps": 1e-6, "vocab_size": 32000, "tie_word_embeddings": False,
    "use_short_conv": False, "conv_size": 4, "fuse_norm": True, "attn": None,
}  # fmt: skip
# What a model here can't be without, or with: key → the one value that it takes, which is the default there too.
MUST: dict[str, Any] = {
    "feature_map": None, "clamp_min": None, "use_output_gate": True, "hidden_act": "swish", "elementwise_affine": True,
    "use_gk": True, "use_gv": False, "attnres_block_size": None,
}  # fmt: skip
RANK, TAU = 16, 16.0  # of FLA's gate, which no key of its config changes


def from_fla(source: str | os.PathLike[str] | Any) -> LanguageModel:
    """The model of a folder that `GLAForCausalLM.save_pretrained` wrote, or of a `GLAForCausalLM` itself: in eval
    mode, on the CPU, weights in fp32. Its `config` says what it is here.

    Raises `ConfigError` (a `ValueError`) that names the file or key, what it got and what it takes.
    """
    if isinstance(source, str | os.PathLike):
        folder = Path(source)
        settings = read_settings(folder)
        where, weights = str(folder / SETTINGS), read_weights(folder)
    else:
        where, settings, weights = "config", source.config.to_dict(), dict(source.state_dict())
    with located(where):
        config = to_config(settings)
        model = build_model(config, whole(settings, "vocab_size"))
        fill_in(model, weights, fla_names(config, bool(settings["fuse_norm"])))
    return model.eval()


def to_fla(model: LanguageModel, folder: str | os.PathLike[str], separator: int | None = None) -> Path:
    """Write `config.json` and `model.safetensors` for `GLAForCausalLM.from_pretrained(folder)`; the folder.

    `separator`: the token between documents, which FLA's config has as the first and last of each. Raises `ConfigError`
    before anything is written: with the key that FLA's config can't express, for a folder that can't be made, and for
    one with another model in it.
    """
    settings = to_settings(model.config, model.embedding.num_embeddings)
    settings |= {"bos_token_id": separator, "eos_token_id": separator}
    place = Path(folder)
    check_free(place)
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{place}: {(error.strerror or str(error)).lower()}") from error
    (place / WEIGHTS).unlink(missing_ok=True)  # killed in between, there are none, rather than those of another config
    write_json(place / SETTINGS, settings)
    names = fla_names(model.config)
    weights = {names[name]: x.unsqueeze(1) if "_conv." in name else x for name, x in own_weights(model).items()}
    write_weights({name: x.to("cpu", torch.float32) for name, x in weights.items()}, {"format": "pt"}, place / WEIGHTS)
    return place


def export_to_fla(folder: Path, to: Path | None = None) -> Path:
    """`to_fla` of a trial's folder or an exported one, to `to`, or to `fla` inside it; the folder. Raises
    `ConfigError`."""
    trained = open_folder(folder)
    place = to or folder / "fla"
    check_link(place, given=to is not None)
    return to_fla(trained.model, place, SEPARATOR[0] if trained.reads_bytes else None)


def fla_names(config: ModelConfig, fuse_norm: bool = True) -> dict[str, str]:
    """The name here → FLA's, of every weight that a model can have; those that `config` has no use for included."""
    norm = "attn.g_norm_swish_gate.weight" if fuse_norm else "attn.g_norm.weight"
    layer = LAYER | {"mixer.norm.weight": norm}
    layers = {f"blocks.{i}.{ours}": f"model.layers.{i}.{theirs}"
              for i in range(config.layers) for ours, theirs in layer.items()}  # fmt: skip
    return NAMES | layers


def fill_in(model: LanguageModel, weights: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
    """Copy FLA's `weights` into `model`. Raises `ConfigError` unless they are those of such a model."""
    wanted = {names[name]: x for name, x in own_weights(model).items()}
    known = {names[name] for name in model.state_dict()}  # with a tied head, which is the embedding, as FLA loads it
    for name in sorted(wanted.keys() - weights.keys()) + sorted(weights.keys() - known):
        what = "is missing" if name in wanted else "is of no GLAForCausalLM with this config"
        raise ConfigError(f"weights: {name} {what} (names as in FLA 0.6.0)")
    for name, x in wanted.items():
        given = weights[name].detach()
        if not given.is_floating_point():
            raise ConfigError(f"weights: {name} is of {given.dtype}, takes floating-point numbers")
        given = given.squeeze(1) if "_conv1d." in name and given.ndim == 3 else given
        if given.shape != x.shape:
            raise ConfigError(f"weights: {name} is {list(given.shape)}, takes {list(x.shape)} with this config")
        x.copy_(given)


def to_config(settings: dict[str, Any]) -> ModelConfig:
    """`GLAConfig`'s keys as a `ModelConfig`. `settings` are completed by their defaults.

    Raises `ConfigError` for a key with a value that no model here has.
    """
    if settings.get("model_type") != "gla":
        raise ConfigError(f"model_type: got {settings.get('model_type')!r}, takes 'gla' (FLA's GLAForCausalLM)")
    for key, value in DEFAULTS.items():
        settings.setdefault(key, value)
    for key, takes in MUST.items():
        if settings.get(key, takes) != takes:
            raise ConfigError(
                f"{key}: got {json.dumps(settings[key])}, takes {json.dumps(takes)}: there is no other here"
            )
    heads, shared = settings["num_heads"], settings.get("num_kv_heads")
    if shared not in (None, heads):
        raise ConfigError(f"num_kv_heads: got {shared!r}, takes null or num_heads, {heads}: heads share none here")
    dim, layers = whole(settings, "hidden_size"), whole(settings, "num_hidden_layers")
    model = {
        "dim": dim,
        "layers": layers,
        "heads": whole(settings, "num_heads"),
        "expand_k": settings["expand_k"],
        "expand_v": settings["expand_v"],
        **ffn_of(settings),
        "tie_embeddings": settings["tie_word_embeddings"],
        "norm_eps": settings["norm_eps"],
        "short_conv": whole(settings, "conv_size") if settings["use_short_conv"] else 0,
        "gate": {"name": "data_dependent", "rank": RANK, "tau": TAU},
        **softmax_of(settings["attn"], layers),
    }
    return resolve_model({"model": model}).model


def ffn_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that give the SwiGLU `intermediate_size` channels, or as many as FLA makes of `hidden_ratio`."""
    dim = whole(settings, "hidden_size")
    if settings["intermediate_size"] is not None:
        width = whole(settings, "intermediate_size")
    else:
        ratio = settings["hidden_ratio"] or 4
        if type(ratio) not in (int, float) or not 0 < ratio <= 1000:
            raise ConfigError(f"hidden_ratio: got {ratio!r}, takes a number above 0, to 1000")
        width = 256 * math.ceil(int(dim * ratio * 2 / 3) / 256)
    # Half a channel less is rounded up to the width, where width / dim might be rounded to one more.
    exact = ModelConfig(dim=dim, ffn_ratio=width / dim, ffn_multiple=1)
    ratio = exact.ffn_ratio if ffn_width(exact) == width else (width - 0.5) / dim
    return {"ffn_ratio": ratio, "ffn_multiple": 1}


def softmax_of(attn: Any, layers: int) -> dict[str, Any]:
    """FLA's `attn`, the layers that are softmax attention, as `mixer`, `softmax_heads` and `window`."""
    if isinstance(attn, list) and len(attn) == 1:
        attn = attn[0]
    if attn is None:
        return {}
    if not isinstance(attn, Mapping):
        raise ConfigError(f"attn: got {attn!r}, takes null or one mapping: all softmax layers are alike here")
    if not isinstance(attn.get("layers"), list) or "num_heads" not in attn:
        raise ConfigError(f"attn: got {dict(attn)!r}, takes a mapping with layers, a list, and num_heads")
    heads = attn["num_heads"]
    for key, takes in {"num_kv_heads": heads, "qkv_bias": False, "rope_theta": 10000.0}.items():
        if attn.get(key) not in (None, takes):
            raise ConfigError(
                f"attn.{key}: got {json.dumps(attn[key])}, takes {json.dumps(takes)}: there is no other here"
            )
    kinds = ["softmax" if layer in attn["layers"] else "gla" for layer in range(layers)]
    return {"mixer": kinds, "softmax_heads": heads, "window": attn.get("window_size")}


def to_settings(config: ModelConfig, vocab_size: int) -> dict[str, Any]:
    """A `ModelConfig` as the config.json of a `GLAForCausalLM`. Raises `ConfigError` for what that can't express."""
    kinds = mixers(config)
    if "gla" not in kinds:
        raise ConfigError("model.mixer: got softmax alone, takes a layer of gla: FLA's GLAForCausalLM is for those")
    gate = {"name": "data_dependent", "rank": RANK, "tau": TAU}
    for key, takes in gate.items():
        if config.gate.get(key) != takes:
            raise ConfigError(
                f"model.gate.{key}: got {config.gate.get(key)!r}, takes {takes!r}: FLA's GLA has no other"
            )
    if config.rope:
        raise ConfigError("model.rope: got true, takes false: FLA's GLA has no rotary positions")
    attn = {
        "layers": [layer for layer, kind in enumerate(kinds) if kind == "softmax"],
        "num_heads": softmax_heads(config),
        "num_kv_heads": softmax_heads(config),
        "qkv_bias": False,
        "window_size": config.window,
        "rope_theta": 10000.0,
    }
    return {
        "architectures": ["GLAForCausalLM"],
        "model_type": "gla",
        "hidden_size": config.dim,
        "num_hidden_layers": config.layers,
        "num_heads": config.heads,
        "expand_k": config.expand_k,
        "expand_v": config.expand_v,
        "intermediate_size": ffn_width(config),
        "hidden_act": "swish",
        "norm_eps": config.norm_eps,
        "vocab_size": vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
        "use_short_conv": config.short_conv > 0,
        "conv_size": config.short_conv or 4,
        "fuse_norm": True,
        "attn": attn if attn["layers"] else None,
        "dtype": "float32",
    }


def whole(settings: Mapping[str, Any], key: str) -> int:
    value = settings[key]
    if type(value) is not int or value < 1:
        raise ConfigError(f"{key}: got {value!r}, takes a whole number from 1")
    return value
