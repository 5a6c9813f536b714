"""Properties of every registered source and every shipped part."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gla_ablate.data import DATA, build_source, check_data
from gla_ablate.data.source import IGNORED
from gla_ablate.errors import ConfigError
from gla_ablate.yaml_io import read_yaml

ROOT = Path(__file__).parents[2]
PARTS = sorted((ROOT / "configs" / "data").glob("*.yaml"))


@pytest.fixture(params=DATA.names())
def config(request, write):
    """The smallest config of each source, on local data."""
    text = write("corpus/train/text.txt", b"A line of text, and another one.\n" * 200)
    required = {"text": {"files": [text]}, "hub": {"path": str(Path(text).parent)}}
    return {"name": request.param, "seq_len": 32, "batch_size": 4, **required.get(request.param, {})}


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.stem)
def test_shipped_parts_say_what_they_are_and_pass_the_check(part, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert part.read_text().startswith("# ")
    values = read_yaml(part)
    assert list(values) == ["data"]
    assert values["data"]["name"] == part.stem
    assert values["data"].items() <= check_data(values["data"]).items()


def test_each_source_has_a_shipped_part():
    assert [part.stem for part in PARTS] == DATA.names()


def test_a_checked_config_is_complete_and_checks_again_to_itself(config):
    resolved = check_data(config)
    assert set(resolved) == {"name", *DATA.options(config["name"])}
    assert check_data(resolved) == resolved


def test_rows_have_the_promised_form(config):
    source = build_source(check_data(config))
    source.prepare()
    for rows in (source.train, source.val):
        for batch, shape in ((rows[0], (32,)), (rows[[0, 1, 2]], (3, 32))):
            assert set(batch) == {"inputs", "targets"}
            for tokens in batch.values():
                assert tokens.shape == shape and tokens.dtype == torch.int64
            assert batch["inputs"].min() >= 0 and batch["inputs"].max() < source.vocab_size
            assert batch["targets"].max() < source.vocab_size
            assert (batch["targets"] != IGNORED).double().mean() == pytest.approx(source.labelled_share)


def test_validation_is_capped_in_tokens_and_the_same_for_every_batch_size(config):
    sources = [build_source(check_data({**config, "val_tokens": 99, "batch_size": size})) for size in (1, 4)]
    first, second = (source.val for source in sources)
    assert len(first) == len(second) == 3
    assert torch.equal(first[[0, 1, 2]]["inputs"], second[[0, 1, 2]]["inputs"])


def test_the_stamp_identifies_what_was_read(config):
    stamp = build_source(check_data(config)).stamp()
    assert stamp["name"] == config["name"]
    assert stamp["bytes"] > 0 and len(stamp["sha256"]) == 64
    assert build_source(check_data(config)).stamp() == stamp


@pytest.mark.parametrize("key", ["seq_len", "batch_size", "val_tokens"])
@pytest.mark.parametrize("value", [0, -3, 2.5, True, "many", None])
def test_sizes_that_make_no_sense_name_their_key(config, key, value):
    with pytest.raises(ConfigError, match=rf"data\.{key}.*{value}"):
        check_data({**config, key: value})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("stdlb", r"data\.name.*'stdlb', did you mean 'stdlib'"),
        ("", r"data\.name.*''"),
        (None, r"data\.name.*None.*stdlib"),
        (["stdlib"], r"data\.name.*\['stdlib'\]"),
    ],
)
def test_an_unknown_source_is_named_with_the_nearest(name, message):
    with pytest.raises(ConfigError, match=message):
        check_data({"name": name})


def test_a_mistyped_key_is_named_with_the_nearest(config):
    with pytest.raises(ConfigError, match=r"data\.seqlen.*did you mean 'seq_len'"):
        check_data({**config, "seqlen": 8})


def test_checking_needs_neither_lightning_nor_datasets():
    code = (
        "import sys; from gla_ablate.data import check_data; check_data({'name': 'stdlib'});"
        "print([m for m in ('lightning', 'datasets', 'pandas', 'pyarrow', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"
