"""Properties of every registered source and every shipped part."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gla_ablate.data import DATA, build_source, check_data, check_lengths
from gla_ablate.data.source import IGNORED
from gla_ablate.errors import ConfigError
from gla_ablate.yaml_io import read_yaml

ROOT = Path(__file__).parents[2]
PARTS = sorted((ROOT / "configs" / "data").glob("*.yaml"))


@pytest.fixture(params=DATA.names())
def config(request, write):
    """The smallest config of each source, on local data."""
    text = write("corpus/train/text.txt", b"A line of text, and another one.\n" * 200)
    required = {
        "text": {"files": [text]},
        "hub": {"path": str(Path(text).parent)},
        "selective_copying": {"copied": 8},
    }
    return {"name": request.param, "seq_len": 32, "batch_size": 4, **required.get(request.param, {})}


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.stem)
def test_shipped_parts_say_what_they_are_and_pass_the_check(part, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert part.read_text().startswith("# ")
    values = read_yaml(part)
    assert list(values) == ["data"]
    name = values["data"]["name"]
    assert part.stem == name or part.stem.startswith(f"{name}_")
    assert values["data"].items() <= check_data(values["data"]).items()


def test_each_source_has_a_shipped_part():
    assert set(DATA.names()) <= {part.stem for part in PARTS}


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
    rows = source.train[list(range(min(len(source.train), 2000)))]
    assert (rows["targets"] != IGNORED).double().mean() == pytest.approx(source.labelled_share, rel=0.02)


def test_validation_is_capped_in_tokens_and_the_same_for_every_batch_size(config):
    sources = [build_source(check_data({**config, "val_tokens": 99, "batch_size": size})) for size in (1, 4)]
    first, second = (source.val for source in sources)
    assert len(first) == len(second) == 3
    assert torch.equal(first[[0, 1, 2]]["inputs"], second[[0, 1, 2]]["inputs"])


def test_longer_validation_rows_are_as_many_times_longer_within_the_tokens_or_refused_by_their_length(config):
    resolved = check_data({**config, "val_tokens": 200})
    try:
        assert check_lengths(resolved, [3, 1]) == [1, 3]
    except ConfigError as error:  # of a task that has no such rows
        assert str(error).startswith("eval.lengths[0]: got 3 times data.seq_len, rows of 96 tokens: ")
        return
    source = build_source(resolved)
    source.prepare()
    source.prepare_longer(3)
    longer, again = (source.longer_val(3, 3) for _ in range(2))
    assert len(longer) == 2 and len(source.longer_val(1, 3)) == 6
    for tokens, same in zip(longer[[0, 1]].values(), again[[0, 1]].values(), strict=True):
        assert tokens.shape == (2, 96) and tokens.dtype == torch.int64 and tokens.max() < source.vocab_size
        assert torch.equal(tokens, same)
    assert longer[1]["inputs"].shape == (96,) and (longer[[0, 1]]["targets"] != IGNORED).any(1).all()
    with pytest.raises(ConfigError, match=r"^eval\.lengths\[1\]: got 7 times data\.seq_len, rows of 224 tokens: "):
        check_lengths(resolved, [1, 7])


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
