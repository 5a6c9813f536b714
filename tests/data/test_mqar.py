import numpy as np
import pytest
import torch

from gla_ablate.data import build_source, check_data
from gla_ablate.data.mqar import draw_examples
from gla_ablate.errors import ConfigError

SIZES = [  # vocab_size, seq_len, pairs
    (256, 64, 4),
    (8192, 64, 4),
    (8192, 256, 64),
    (12, 10, 2),
    (6, 8, 2),  # all keys in use
    (4, 4, 1),
]


def examples(vocab_size, seq_len, pairs, power=0.01, **options):
    config = {"name": "mqar", "vocab_size": vocab_size, "seq_len": seq_len, "pairs": pairs, "power": power}
    return build_source(check_data({**config, "train_examples": 600, **options})).train


def solve(inputs: list[int], pairs: int) -> list[int]:
    """What perfect memory answers, reading from left to right and not knowing where the queries are."""
    context, known = inputs[: 2 * pairs], {}
    for key, value in zip(context[0::2], context[1::2], strict=True):
        known[key] = value
    return [-100] * len(context) + [known.get(token, -100) for token in inputs[2 * pairs :]]


def test_the_worked_example_is_solved():
    assert solve([3, 8, 5, 6, 3, 2, 9, 6, 5, 11], pairs=2) == [-100] * 4 + [8, -100, -100, -100, 6, -100]


@pytest.mark.parametrize("sizes", SIZES)
def test_perfect_memory_scores_in_full(sizes):
    train = examples(*sizes)
    for row in range(len(train)):
        assert solve(train.inputs[row].tolist(), sizes[2]) == train.targets[row].tolist()


@pytest.mark.parametrize("sizes", SIZES)
def test_fill_is_never_a_live_key(sizes):
    _, _, pairs = sizes
    train = examples(*sizes)
    for inputs, targets in zip(train.inputs, train.targets, strict=True):
        keys = inputs[0 : 2 * pairs : 2]
        fill = inputs[2 * pairs :][targets[2 * pairs :] == -100]
        assert not np.isin(fill, keys).any()
        assert (inputs > 0).all()


@pytest.mark.parametrize("sizes", SIZES)
def test_keys_and_values_come_from_their_halves_without_repetition(sizes):
    vocab_size, _, pairs = sizes
    inputs = examples(*sizes).inputs
    keys, values = inputs[:, 0 : 2 * pairs : 2], inputs[:, 1 : 2 * pairs : 2]
    assert keys.min() >= 1 and keys.max() < vocab_size // 2
    assert values.min() >= vocab_size // 2 and values.max() < vocab_size
    for tokens in (keys, values):
        assert all(len(set(row)) == pairs for row in tokens.tolist())


@pytest.mark.parametrize("sizes", SIZES)
def test_each_key_is_asked_once_at_an_even_distance_behind_the_context(sizes):
    _, seq_len, pairs = sizes
    targets = examples(*sizes).targets
    assert ((targets != -100).sum(axis=1) == pairs).all()
    positions = np.nonzero(targets != -100)[1]
    assert positions.min() >= 2 * pairs and positions.max() < seq_len
    assert (positions % 2 == 0).all()


@pytest.mark.parametrize("power", [0.01, 1.0])
def test_gaps_follow_the_power_law(power):
    targets = np.concatenate(
        [
            draw_examples(np.random.default_rng(block), 256, seq_len=22, vocab_size=16, pairs=1, power=power)[1]
            for block in range(80)
        ]
    )
    gaps = (np.nonzero(targets != -100)[1] - 2) // 2
    expected = np.arange(1, 11) ** (power - 1)
    observed = np.bincount(gaps, minlength=10) / len(gaps)
    np.testing.assert_allclose(observed, expected / expected.sum(), atol=0.015)  # five standard errors


def test_a_split_is_the_same_each_time_and_the_splits_share_no_example():
    config = check_data({"name": "mqar", "vocab_size": 256, "train_examples": 3000})
    first, second = build_source(config), build_source(config)
    assert first.stamp() == second.stamp()
    train, val = ({row.tobytes() for row in split.inputs} for split in (first.train, first.val))
    assert len(train) == 3000 and len(val) == 1024
    assert not train & val


def test_more_examples_leave_the_first_as_they_were():
    few, many = examples(256, 64, 4, train_examples=300), examples(256, 64, 4, train_examples=1000)
    assert np.array_equal(few.inputs, many.inputs[:300]) and np.array_equal(few.targets, many.targets[:300])


def test_fill_is_spread_over_the_allowed_tokens():
    inputs = examples(12, 40, 2, train_examples=5000).inputs
    counts = np.bincount(inputs[:, 4:].ravel(), minlength=12)
    assert counts[0] == 0
    assert counts[1:].min() > 0.5 * counts[1:].mean()


def test_the_source_says_what_a_model_needs_to_know():
    source = build_source(check_data({"name": "mqar", "vocab_size": 100, "pairs": 2}))
    assert source.vocab_size == 100 and source.bytes_per_token is None
    batch = source.val[[0, 5]]
    assert batch["inputs"].shape == batch["targets"].shape == (2, 64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairs": 0}, r"data\.pairs.*0"),
        ({"pairs": 17}, r"data\.seq_len.*64.*68"),
        ({"vocab_size": 8}, r"data\.vocab_size.*8.*10"),
        ({"vocab_size": 10**17}, r"data\.vocab_size.*at most"),
        ({"power": 0}, r"data\.power"),
        ({"power": float("inf")}, r"data\.power.*inf"),
        ({"train_examples": 10}, r"data\.train_examples.*10.*64"),
        ({"pair": 4}, r"data\.pair:.*did you mean 'pairs'"),
        ({"pairs": True}, r"data\.pairs.*True"),
    ],
)
def test_wrong_options_name_their_key(options, message):
    with pytest.raises(ConfigError, match=message):
        check_data({"name": "mqar", **options})


MIXED = {
    "vocab_size": 24,
    "seq_len": 16,
    "pairs": [1, 1, 2, 3],
    "lengths": [8, 8, 10, 14],
    "val_pairs": [2, 5],
    "val_lengths": [9, 24],
    "val_tokens": 24 * 300,
}


def mixed(**options):
    return build_source(check_data({"name": "mqar", "batch_size": 4, "train_examples": 600, **MIXED, **options}))


def test_a_mixtures_examples_take_turns_and_end_with_zeros():
    train = mixed().train
    for setting, (length, pairs) in enumerate(zip(MIXED["lengths"], MIXED["pairs"], strict=True)):
        inputs, targets = train.inputs[setting::4], train.targets[setting::4]
        assert inputs.shape == targets.shape == (150, 16)
        assert (inputs[:, length:] == 0).all() and (inputs[:, :length] > 0).all()
        assert ((targets != -100).sum(axis=1) == pairs).all() and (targets[:, length:] == -100).all()
        for row in range(150):
            assert solve(inputs[row, :length].tolist(), pairs) == targets[row, :length].tolist()


def test_a_mixtures_settings_come_up_as_often_as_they_are_listed():
    source = mixed(train_examples=256)
    assert (source.train.targets != -100).mean() == source.labelled_share == 7 / (4 * 16)


def test_validation_may_be_in_other_settings_whose_rows_say_which_they_are_of():
    source = mixed()
    assert source.val_settings == ("2_pairs_in_9", "5_pairs_in_24")
    batch = source.val[[0, 1, 2, 255, 256, 299]]
    assert batch["inputs"].shape == batch["targets"].shape == (6, 24)
    assert batch["setting"].tolist() == [0, 1, 0, 1, 0, 1]
    assert ((batch["targets"] != -100).sum(1) == torch.tensor([2, 5])[batch["setting"]]).all()
    assert source.val[1]["setting"] == 1
    assert set(source.train[[0, 1]]) == {"inputs", "targets"}


def test_without_settings_of_its_own_validation_has_those_of_training_each_once():
    source = mixed(val_pairs=None, val_lengths=None)
    assert source.val_settings == ("1_pairs_in_8", "2_pairs_in_10", "3_pairs_in_14")
    assert source.val.inputs.shape == (450, 16)
    assert mixed(pairs=[4], lengths=None, val_pairs=None, val_lengths=None).val_settings == ()


def test_one_setting_in_a_list_is_that_setting():
    config = {"name": "mqar", "vocab_size": 64, "train_examples": 300}
    assert build_source(check_data({**config, "pairs": [4]})).stamp() == build_source(check_data(config)).stamp()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": [8, 8, 10]}, r"data\.lengths.*as many as pairs, 4"),
        ({"pairs": 1}, r"data\.lengths.*as many as pairs, 1"),
        ({"pairs": []}, r"data\.pairs.*from 1 to 256"),
        ({"pairs": [1, 0, 2, 3]}, r"data\.pairs.*at least 1"),
        ({"pairs": [1, 1, 3, 3]}, r"data\.lengths: got 10, takes at least 12, for 3 pairs"),
        ({"lengths": [8, 8, 10, 17]}, r"data\.seq_len: got 16, takes at least 17"),
        ({"val_pairs": None}, r"data\.val_lengths.*null without val_pairs"),
        ({"val_lengths": None}, r"data\.seq_len: got 16, takes at least 20, for 5 pairs"),
        ({"val_lengths": [9, 19]}, r"data\.val_lengths: got 19, takes at least 20, for 5 pairs"),
        ({"val_pairs": [2, 0]}, r"data\.val_pairs.*at least 1"),
        ({"val_tokens": 47}, r"data\.val_tokens: got 47, takes at least 48, for 2 rows of 24"),
        ({"vocab_size": 11}, r"data\.vocab_size: got 11, takes at least 12, for 5 different keys"),
        ({"pairs": "4"}, r"data\.pairs.*'4'.*int \| list"),
    ],
)
def test_a_mixture_that_cannot_be_made_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        mixed(**options)


def test_settings_that_fix_the_length_of_rows_have_no_other():
    mixed(lengths=None, val_lengths=None, val_pairs=[2, 3]).check_longer(4)
    with pytest.raises(ConfigError, match=r"data\.val_lengths.*null where eval\.lengths"):
        mixed(lengths=None).check_longer(1)
    with pytest.raises(ConfigError, match=r"data\.lengths.*null where eval\.lengths"):
        mixed(val_lengths=None, val_pairs=[2, 3]).check_longer(4)
