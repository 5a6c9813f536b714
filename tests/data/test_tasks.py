"""Properties of every task: solved by who reads it, and by nobody else.

A new one is tested as soon as it is registered; what it needs here is its solver, its chance level and its example.
"""

import importlib
import re

import numpy as np
import pytest

from gla_ablate.data import DATA, build_source, check_data
from gla_ablate.data.drawn import DrawnSource
from gla_ablate.data.source import IGNORED
from gla_ablate.errors import ConfigError

NAMES = [name for name in DATA.names() if issubclass(DATA[name], DrawnSource)]

# Options of several sizes: the defaults, small, at the edge of what can be made.
OPTIONS = {
    "mqar": [{}, {"vocab_size": 12, "seq_len": 10, "pairs": 2}, {"vocab_size": 4, "seq_len": 4, "pairs": 1}],
    "selective_copying": [{}, {"seq_len": 31, "copied": 3}, {"vocab_size": 4, "seq_len": 17, "copied": 8}],
    "in_context_recall": [{}, {"vocab_size": 33, "seq_len": 41}, {"vocab_size": 4, "seq_len": 3}],
    "noisy_recall": [
        {},
        {"noise": 0.8, "seq_len": 31},
        {"vocab_size": 5, "noise_words": 1, "seq_len": 3, "noise": 0.9},
    ],
    "fuzzy_recall": [
        {},
        {"vocab_size": 32, "key_tokens": 1, "value_tokens": 4},
        {"vocab_size": 7, "seq_len": 11},
        {"vocab_size": 5, "key_tokens": 1, "value_tokens": 1, "seq_len": 3},
    ],
    "memorization": [{}, {"vocab_size": 24, "seq_len": 7}, {"vocab_size": 5, "seq_len": 2}],
    "induction_heads": [{}, {"vocab_size": 20, "seq_len": 30}, {"vocab_size": 3, "seq_len": 3}],
    "compression": [{}, {"symbols": 4, "seq_len": 33}, {"symbols": 2, "seq_len": 3}],
}
CASES = [(name, options) for name in NAMES for options in OPTIONS.get(name, [{}])]

# What the example in the docstring is drawn with, its letters, and how many examples to look for it among: None where
# it would be too many.
EXAMPLES = {
    "mqar": ({"vocab_size": 12, "pairs": 2}, {}, None),
    "selective_copying": ({"vocab_size": 6, "copied": 3}, {"_": 4, "c": 5}, 20_000),
    "in_context_recall": ({"vocab_size": 8}, {}, 30_000),
    "noisy_recall": ({"vocab_size": 10, "noise_words": 2, "noise": 0.5}, {}, 100_000),
    "fuzzy_recall": ({"vocab_size": 9, "key_tokens": 2, "value_tokens": 2}, {"f": 8}, 2000),
    "memorization": ({"vocab_size": 9}, {"i": 8}, 2000),
    "induction_heads": ({"vocab_size": 5}, {"s": 4}, 100_000),
    "compression": ({"symbols": 3}, {"c": 3}, 2000),
}


def built(name, **options):
    return build_source(check_data({"name": name, "batch_size": 1, **options}))


# Each reads from left to right and gives, at every position, the answer that it knows by then, or None.


def solve_mqar(source, inputs):
    pairs = source.settings["train"][0].pairs
    known = dict(zip(inputs[0 : 2 * pairs : 2], inputs[1 : 2 * pairs : 2], strict=True))
    return [None] * (2 * pairs) + [known.get(token) for token in inputs[2 * pairs :]]


def solve_selective_copying(source, inputs):
    blank, copy = source.vocab_size - 2, source.vocab_size - 1
    kept, answers = [], []
    for token in inputs:
        answers.append(kept.pop(0) if copy in inputs[: len(answers)] and kept else None)
        if token < blank:
            kept.append(token)
    return answers


def solve_recall(keys, inputs):
    known, answers = {}, []
    for i, token in enumerate(inputs):
        answers.append(known.get(token))
        if i and inputs[i - 1] < keys:
            known[inputs[i - 1]] = token
    return answers


def solve_in_context_recall(source, inputs):
    return solve_recall(source.vocab_size // 2, inputs)


def solve_noisy_recall(source, inputs):
    return solve_recall((source.vocab_size - source.noise_words) // 2, inputs)


def solve_fuzzy_recall(source, inputs):
    half, fill = (source.vocab_size - 1) // 2, source.vocab_size - 1
    known, answers, key, value = {}, [], (), ()
    for token in inputs:
        if token < half and value:  # a new pair begins: the one before is whole
            known.setdefault(key, value)
            key, value = (), ()
        if token < half:
            key += (token,)
        elif token != fill:
            value += (token,)
        expected = known.get(key, ())
        answers.append(expected[len(value)] if len(value) < len(expected) else None)
    return answers


def solve_memorization(source, inputs):
    """By what training taught."""
    if not hasattr(source, "learned"):
        rows, positions = np.nonzero(source.train.targets != IGNORED)
        keys, values = source.train.inputs[rows, positions - 1], source.train.targets[rows, positions]
        source.learned = dict(zip(keys.tolist(), values.tolist(), strict=True))
    insert = source.vocab_size - 1
    return [source.learned[inputs[i - 1]] if token == insert else None for i, token in enumerate(inputs)]


def solve_induction_heads(source, inputs):
    special, first = source.vocab_size - 1, inputs.index(source.vocab_size - 1)
    return [inputs[first + 1] if token == special and i > first else None for i, token in enumerate(inputs)]


def solve_compression(source, inputs):
    kept = inputs[: inputs.index(source.symbols)]
    return [kept[token - source.symbols - 1] if token > source.symbols else None for token in inputs]


# How many answers are equally likely, to who hasn't read.
ANSWERS = {
    "mqar": lambda source: source.vocab_size - source.vocab_size // 2,
    "selective_copying": lambda source: source.vocab_size - 2,
    "in_context_recall": lambda source: source.vocab_size - source.vocab_size // 2,
    "noisy_recall": lambda source: source.vocab_size - source.noise_words - source.keys,
    "fuzzy_recall": lambda source: source.vocab_size - 1 - (source.vocab_size - 1) // 2,
    "memorization": lambda source: source.keys,
    "induction_heads": lambda source: source.vocab_size - 1,
    "compression": lambda source: source.symbols,
}


def answers(source, rows) -> tuple[np.ndarray, np.ndarray]:
    """What the solver says, −1 for nothing, and the targets: [N, seq_len]."""
    solve = globals()[f"solve_{source.name}"]
    said = [[-1 if answer is None else answer for answer in solve(source, row)] for row in rows.inputs.tolist()]
    return np.array(said), rows.targets


@pytest.mark.parametrize(("name", "options"), CASES)
def test_who_reads_from_left_to_right_answers_every_target(name, options):
    source = built(name, train_examples=600, val_tokens=300 * options.get("seq_len", 256), **options)
    for rows in (source.train, source.val):
        said, targets = answers(source, rows)
        counts = targets != IGNORED
        assert counts.any(axis=1).all()
        assert (said[counts] == targets[counts]).all()
        if name != "fuzzy_recall":  # where the beginning of a key may be another key
            assert (said[~counts] == -1).all()  # a target wherever there can be one


def small(name):
    """A source with about 4000 examples."""
    options = {"seq_len": 32, "val_tokens": 4000 * 32, "train_examples": 4000}
    return built(name, **options | {"selective_copying": {"copied": 8}, "mqar": {"vocab_size": 64}}.get(name, {}))


@pytest.mark.parametrize("name", NAMES)
def test_shuffled_answers_are_right_by_chance_alone(name):
    """The solver's are, against targets that change places among all that count; so is whoever reads nothing and gives
    the same answer everywhere, against the targets as they are."""
    source = small(name)
    said, targets = answers(source, source.val)
    counts = targets != IGNORED
    said, targets = said[counts], targets[counts]
    chance = 1 / ANSWERS[name](source)
    error = 5 * (chance * (1 - chance) / len(source.val)) ** 0.5  # targets of one row aren't independent, rows are
    shuffled = np.random.default_rng(0).permutation(targets)
    assert (said == shuffled).mean() == pytest.approx(chance, abs=error)
    commonest = np.bincount(targets).max() / len(targets)
    assert chance <= commonest < chance + error


@pytest.mark.parametrize("name", NAMES)
def test_the_docstrings_example_is_one_that_is_drawn(name):
    module = importlib.import_module(DATA[name].__module__)
    options, letters, among = EXAMPLES[name]

    def row(kind):
        (line,) = re.findall(rf"^    {kind} +((?:\S+ {{1,3}})+\S+)(?: {{4,}}.*)?$", module.__doc__, re.M)
        return [letters[t] if t in letters else IGNORED if t == "·" else int(t.strip("*")) for t in line.split()]

    positions, inputs, targets = row("position"), row("inputs"), row("targets")
    assert positions == list(range(len(inputs))) and len(targets) == len(inputs)
    source = built(name, seq_len=len(inputs), train_examples=among or 256, **options)
    said = globals()[f"solve_{name}"](source, inputs)
    assert all(target in (IGNORED, answer) for answer, target in zip(said, targets, strict=True))
    if among:
        (found,) = np.nonzero((source.train.inputs == inputs).all(axis=1))
        assert len(found)
        assert (source.train.targets[found] == targets).all()


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_the_same_however_many_there_are_and_no_other_splits(name):
    few, many = (built(name, train_examples=count, seq_len=64) for count in (300, 600))
    for kind in ("inputs", "targets"):
        assert np.array_equal(getattr(few.train, kind), getattr(many.train, kind)[:300])
        assert getattr(few.train, kind).dtype == np.int32
    assert not np.array_equal(few.train.inputs[:200], few.val.inputs[:200])
    assert len({row.tobytes() for row in many.train.inputs}) > 550  # blocks differ


def test_memorization_teaches_every_key_and_each_has_a_value_of_its_own():
    source = built("memorization", train_examples=256, vocab_size=8192)  # 4095 keys, 4096 asked
    rows, positions = np.nonzero(source.train.targets != IGNORED)
    assert set(source.train.inputs[rows, positions - 1]) == set(range(4095))
    assert len(set(source.dictionary)) == 4095
    assert source.dictionary.min() >= 4095 and source.dictionary.max() < 8191


def test_noise_takes_the_places_that_it_is_asked_to():
    for noise in (0.0, 0.3, 0.8):
        source = built("noisy_recall", noise=noise, train_examples=4000)
        noisy = source.train.inputs >= 16
        assert (noisy[:, ::2] == noisy[:, 1::2]).all()
        assert noisy[:, ::2].mean() == pytest.approx(noise * 62 / 64, abs=0.01)  # one of the others, and the last, not
        assert not noisy[:, -2:].any()


def test_fuzzy_keys_are_of_all_sizes_in_training_and_of_the_largest_in_validation():
    source = built("fuzzy_recall", train_examples=1000)

    def runs(rows):
        """Lengths of the runs of key tokens."""
        text = " ".join("".join("k" if token < 7 else "v" for token in row) for row in rows.inputs.tolist())
        return np.bincount([len(run) for run in re.findall("k+", text)], minlength=4)

    train, val = runs(source.train), runs(source.val)
    assert train.sum() == train[1:4].sum() and train[1:4].min() > 0.3 * train.sum()
    assert val.sum() == val[3] > 0


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("selective_copying", {"copied": 128}, r"data\.seq_len.*256.*at least 257, for 128 tokens"),
        ("selective_copying", {"copied": 0}, r"data\.copied.*0"),
        ("selective_copying", {"vocab_size": 3}, r"data\.vocab_size.*3.*at least 4"),
        ("in_context_recall", {"vocab_size": 3}, r"data\.vocab_size.*3.*at least 4"),
        ("in_context_recall", {"seq_len": 2}, r"data\.seq_len.*2.*at least 3"),
        ("noisy_recall", {"vocab_size": 19}, r"data\.vocab_size.*19.*at least 20.*16 words of noise"),
        ("noisy_recall", {"noise": 1.0}, r"data\.noise.*1\.0"),
        ("noisy_recall", {"noise": -0.1}, r"data\.noise.*-0\.1"),
        ("noisy_recall", {"noise": float("nan")}, r"data\.noise.*nan"),
        ("noisy_recall", {"noise_words": 0}, r"data\.noise_words.*0"),
        ("fuzzy_recall", {"key_tokens": 8}, r"data\.vocab_size.*16.*at least 17, for keys of 8"),
        ("fuzzy_recall", {"seq_len": 10}, r"data\.seq_len.*10.*at least 11"),
        ("fuzzy_recall", {"key_tokens": 17}, r"data\.key_tokens.*17.*from 1 to 16"),
        ("fuzzy_recall", {"value_tokens": 0}, r"data\.value_tokens.*0"),
        ("memorization", {"vocab_size": 4}, r"data\.vocab_size.*4.*at least 5"),
        ("memorization", {"vocab_size": 8195}, r"data\.seq_len.*32.*at least 34, for 4097 keys"),
        ("memorization", {"vocab_size": 8192, "train_examples": 255}, r"data\.train_examples.*255.*at least 256"),
        ("induction_heads", {"vocab_size": 2}, r"data\.vocab_size.*2.*at least 3"),
        ("induction_heads", {"seq_len": 2}, r"data\.seq_len.*2.*at least 3"),
        ("compression", {"symbols": 1}, r"data\.symbols.*1.*at least 2"),
        ("compression", {"symbols": 10**9}, r"data\.symbols.*at most"),
        ("compression", {"vocab_size": 16}, r"data\.vocab_size.*no such option"),
    ],
)
def test_a_task_that_cannot_be_made_is_refused_with_what_it_takes(name, options, message):
    with pytest.raises(ConfigError, match=message):
        check_data({"name": name, "batch_size": 1, **options})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", [{"train_examples": 3, "batch_size": 4}, {"train_examples": 10**12}])
def test_too_few_and_too_many_examples_are_refused(name, options):
    with pytest.raises(ConfigError, match=rf"data\.train_examples: got {options['train_examples']}, takes at "):
        check_data({"name": name, **options})
