import numpy as np
import pytest

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
            draw_examples(np.random.default_rng(block), seq_len=22, vocab_size=16, pairs=1, power=power)[1]
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
        ({"train_examples": 10}, r"data\.train_examples.*10.*64"),
        ({"pair": 4}, r"data\.pair:.*did you mean 'pairs'"),
        ({"pairs": True}, r"data\.pairs.*True"),
    ],
)
def test_wrong_options_name_their_key(options, message):
    with pytest.raises(ConfigError, match=message):
        check_data({"name": "mqar", **options})
