import pytest

from gla_ablate.config import RULES, Config, merge, read_config, resolve, to_dict, write_config
from gla_ablate.errors import ConfigError

BASE = {
    "model": {"dim": 64, "gate": {"name": "data_dependent", "rank": 4}},
    "data": {"name": "mqar", "vocab_size": 64, "seq_len": 32, "batch_size": 2},
}


def test_a_dotted_key_changes_that_value_alone():
    assert merge(BASE, {"model.dim": 128}) == {**BASE, "model": {**BASE["model"], "dim": 128}}
    assert BASE["model"]["dim"] == 64


@pytest.mark.parametrize(
    "layer", [{"model.gate": {"name": "fixed_decay"}}, {"model": {"gate": {"name": "fixed_decay"}}}]
)
def test_a_gate_given_whole_replaces_the_present_one(layer):
    assert merge(BASE, layer)["model"]["gate"] == {"name": "fixed_decay"}


def test_a_gate_given_whole_keeps_no_option_of_the_same_gate():
    assert merge(BASE, {"model.gate": {"name": "data_dependent"}})["model"]["gate"] == {"name": "data_dependent"}


def test_naming_another_gate_drops_the_options_and_naming_the_same_keeps_them():
    assert merge(BASE, {"model.gate.name": "none"})["model"]["gate"] == {"name": "none"}
    assert merge(BASE, {"model.gate.name": "data_dependent"})["model"]["gate"] == BASE["model"]["gate"]


def test_an_option_without_a_name_belongs_to_the_present_gate():
    assert merge(BASE, {"model.gate": {"tau": 8}})["model"]["gate"] == {"name": "data_dependent", "rank": 4, "tau": 8}


@pytest.mark.parametrize("layer", [{"data": {"name": "stdlib"}}, {"data.name": "stdlib"}])
def test_another_data_source_keeps_only_what_every_source_has(layer):
    assert merge(BASE, layer)["data"] == {"name": "stdlib", "seq_len": 32, "batch_size": 2}


def test_the_order_of_keys_in_a_layer_does_not_matter():
    layer = {"model.gate.tau": 8, "model.gate.name": "other"}
    assert merge(BASE, layer) == merge(BASE, dict(reversed(layer.items())))
    assert merge(BASE, layer)["model"]["gate"] == {"name": "other", "tau": 8}


def test_a_gate_by_its_bare_name_is_told_how_to_write_it():
    with pytest.raises(ConfigError, match=r"model\.gate: got 'none', takes a mapping, such as \{name: none\}"):
        merge(BASE, {"model.gate": "none"})


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ({"model.dmi": 3}, r"model\.dmi: no such key, did you mean 'dim'\?"),
        ({"modle.dim": 3}, r"modle: no such key, did you mean 'model'\?"),
        ({"model.dim.x": 3}, r"model\.dim: got \{'x': 3\}, takes int"),
        ({"model.dim": True}, r"model\.dim: got True, takes int"),
        ({"model.dim": "1:30"}, r"model\.dim: got '1:30', takes int"),
        ({"model.dim": None}, r"model\.dim: got None, takes int"),
        ({"model.tie_embeddings": "on"}, r"model\.tie_embeddings: got 'on', takes bool"),
        ({"model": 3}, r"model: got 3, takes a mapping"),
        ({"optim.lr": "fast"}, r"optim\.lr: got 'fast', takes float"),
        ({"trainer.precision": "bf16-mixd"}, r"trainer\.precision: got 'bf16-mixd', did you mean 'bf16-mixed'\?"),
        ({"model.heads": 3}, r"model\.heads: got 3"),
        ({"model.chunk_size": "atuo"}, r"model\.chunk_size: got 'atuo', takes int \| auto"),
        ({"model.chunk_size": 48}, r"model\.chunk_size: got 48"),
        ({"model.gate.name": "nonne"}, r"model\.gate\.name: unknown gate 'nonne', did you mean 'none'\?"),
        ({"model.gate": {"name": "none", "rank": 4}}, r"model\.gate\.rank: gate 'none' has no such option"),
        (
            {"trainer.accumulate": 3, "data.batch_size": 8},
            r"trainer\.accumulate: got 3, takes a divisor of data\.batch_size, 8, .* such as 2, or data\.batch_size 9$",
        ),
        (
            {"trainer.accumulate": 16, "data.batch_size": 8},
            r"trainer\.accumulate: .* such as 8, or data\.batch_size 16$",
        ),
        ({"data.name": "stdlb"}, r"data\.name: .*'stdlb', did you mean 'stdlib'\?"),
        ({"data.pairs": "4"}, r"data\.pairs: got '4', takes int"),
    ],
)
def test_a_mistake_is_told_with_its_key_and_what_is_taken(layer, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        resolve(merge(merge(to_dict(Config()), BASE), layer))


@pytest.mark.parametrize("key", RULES)
def test_a_number_out_of_bounds_is_refused_and_the_default_is_not(key):
    resolve(merge(to_dict(Config()), BASE))
    with pytest.raises(ConfigError, match=rf"^{key}: got -1"):
        resolve(merge(merge(to_dict(Config()), BASE), {key: -1}))


@pytest.mark.parametrize("lr", [float("nan"), float("inf"), 0])
def test_a_learning_rate_that_cannot_train_is_refused(lr):
    with pytest.raises(ConfigError, match=r"^optim\.lr"):
        resolve(merge(BASE, {"optim.lr": lr}))


def test_numbers_written_as_text_count_where_a_float_is_taken():
    assert resolve(merge(BASE, {"optim.lr": "1e-3"})).optim.lr == 1e-3


def test_resolving_fills_in_the_options_of_the_gate_and_of_the_data():
    config = resolve(BASE)
    assert config.model.gate == {"name": "data_dependent", "rank": 4, "tau": 16.0}
    assert {"pairs", "val_tokens"} <= set(config.data)


def test_a_config_survives_its_file(tmp_path):
    config = resolve(merge(BASE, {"optim.lr": 1e-5, "trainer.precision": "32-true"}))
    write_config(config, tmp_path / "config.yaml")
    assert read_config(tmp_path / "config.yaml") == config


def test_a_folder_or_a_link_in_the_place_of_a_config_is_no_hindrance(tmp_path):
    config, path, elsewhere = resolve(BASE), tmp_path / "config.yaml", tmp_path / "elsewhere"
    path.mkdir()
    write_config(config, path)
    path.unlink()
    path.symlink_to(elsewhere)
    write_config(config, path)
    assert read_config(path) == config and not elsewhere.exists()


@pytest.mark.parametrize(
    "trainer, message",
    [
        ({"devices": 2, "accumulate": 3}, "trainer.accumulate: got 3, takes a divisor of data.batch_size, 4, over 2"),
        ({"devices": 3}, "data.batch_size: got 8, which 3 devices"),
        ({"devices": 2, "precision": "bf16-true"}, "trainer.precision: got bf16-true, whose fp32 masters are on one"),
    ],
)
def test_what_does_not_go_together_is_refused_with_the_fix(trainer, message):
    data = {"name": "stdlib", "seq_len": 32, "batch_size": 8, "val_tokens": 64}
    with pytest.raises(ConfigError, match=message):
        resolve({"data": data, "trainer": trainer})
