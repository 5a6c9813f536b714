"""What a data source is: a name, typed options, a vocabulary, and two map-style data sets of fixed-length rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Self

from torch import Tensor
from torch.utils.data import Dataset

from gla_ablate.errors import ConfigError
from gla_ablate.registry import Registry

IGNORED = -100  # a target that no loss and no metric counts; the default of torch's cross entropy


class Rows(Dataset[dict[str, Tensor]], ABC):
    """Rows of one length, which is `seq_len`; in validation it may be another. `rows[i]` is one row, `rows[[i, j, …]]`
    a batch read at once.

    Both give `{"inputs": int64 [..., seq_len], "targets": int64 [..., seq_len]}`; `targets[..., t]` is what the model
    should predict after reading `inputs[..., : t + 1]`, or `IGNORED`. Of a source with `val_settings`, validation gives
    "setting" as well, int64 [...]: which of them a row is of.
    """

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, rows: int | list[int]) -> dict[str, Tensor]: ...


class DataSource(ABC):
    """A corpus or a task. The keyword-only parameters of a subclass's `__init__` are the keys that `data:` takes.

    Building one checks its options and is cheap; reading starts with `prepare`, or with the first use of `train`, `val`
    or `stamp`.
    """

    vocab_size: int
    bytes_per_token: float | None  # None where bits per byte makes no sense
    labelled_share: float = 1.0  # of training tokens, with a target that counts; expected, where rows differ
    val_settings: tuple[str, ...] = ()  # of a task that validates several, each for an accuracy of its own
    _options: dict[str, Any]  # that it was built with

    def __new__(cls, *args: Any, **options: Any) -> Self:
        source = super().__new__(cls)
        source._options = options
        return source

    def __init__(self, seq_len: int, batch_size: int, val_tokens: int) -> None:
        """`batch_size` rows of `seq_len` tokens a training step; validation reads `val_tokens` tokens at most, so that
        trials with another batch size are judged on the same rows. Raises `ConfigError` for a size below one row."""
        require(seq_len >= 1, "seq_len", seq_len, "at least 1")
        require(batch_size >= 1, "batch_size", batch_size, "at least 1")
        require(val_tokens >= seq_len, "val_tokens", val_tokens, f"at least one row of {seq_len} tokens")
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.val_tokens = val_tokens
        self.val_rows = val_tokens // seq_len  # at most

    @abstractmethod
    def prepare(self) -> None:
        """Do, once for all processes on this machine, what comes before reading. Raises `ConfigError` for data that
        can't be read or are too small for one batch."""

    @property
    @abstractmethod
    def train(self) -> Rows: ...

    @property
    @abstractmethod
    def val(self) -> Rows:
        """The same rows for every seed and batch size."""

    def at_length(self, seq_len: int) -> Self:
        """The same source with rows of another length. Raises `ConfigError` for one that it can't make."""
        return type(self)(**self._options | {"seq_len": seq_len})

    def check_longer(self, multiple: int) -> None:
        """That there are validation rows of `multiple · seq_len` tokens, as far as that shows without reading. Raises
        `ConfigError`."""
        longer = self.at_length(multiple * self.seq_len)
        if longer.vocab_size != self.vocab_size:
            raise ConfigError(f"its rows have {longer.vocab_size} words there, and {self.vocab_size} in training")

    def prepare_longer(self, longest: int) -> None:
        """As `prepare`, for validation rows up to `longest · seq_len` tokens long. Raises `ConfigError` for data that
        are too small for one."""
        self.check_longer(longest)

    def longer_val(self, multiple: int, longest: int) -> Rows:
        """Validation rows of `multiple · seq_len` tokens, `val_tokens` tokens of them at most; `longest` is the largest
        multiple that will be asked for: a text is cut so that all have the same tokens. As drawn by default, which
        gives a task's longer rows what its options say of one row."""
        return self.val if multiple == 1 else self.at_length(multiple * self.seq_len).val

    @abstractmethod
    def stamp(self) -> dict[str, Any]:
        """What was read: `name`, `bytes`, `sha256` and the source's own counts. Equal sha256 means equal data."""


DATA: Registry[DataSource] = Registry("data source")


def check_data(config: dict[str, Any]) -> dict[str, Any]:
    """`config`, the `data:` part of a trial, with every key checked and the defaults filled in.

    Raises `ConfigError` naming the key. Local files must exist; nothing is read and the hub isn't asked.
    """
    options = {key: value for key, value in config.items() if key != "name"}
    name = config.get("name")
    if not isinstance(name, str):
        raise ConfigError(f"data.name: got {name!r}, takes one of {', '.join(DATA.names())}")
    try:
        DATA[name]
    except ConfigError as error:
        raise ConfigError(f"data.name: {error}") from None
    resolved = {"name": name, **DATA.resolve(name, options, "data")}
    build_source(resolved)
    return resolved


def check_lengths(config: dict[str, Any], lengths: list[int]) -> list[int]:
    """`eval.lengths`, in order, for the resolved `data:` part `config`. Raises `ConfigError` that names the length."""
    source = build_source(config) if lengths else None
    for i, multiple in enumerate(lengths):
        key = f"eval.lengths[{i}]"
        if multiple < 1:
            raise ConfigError(f"{key}: got {multiple}, takes a whole number from 1, times data.seq_len")
        if multiple in lengths[:i]:
            raise ConfigError(f"{key}: {multiple} stands twice")
        assert source is not None
        try:
            source.check_longer(multiple)
        except ConfigError as error:
            at = f"{multiple} times data.seq_len, rows of {multiple * source.seq_len} tokens"
            raise ConfigError(f"{key}: got {at}: {error}") from error
    return sorted(lengths)


def build_source(config: dict[str, Any]) -> DataSource:
    """The source that a resolved `data:` part describes."""
    options = {key: value for key, value in config.items() if key != "name"}
    return DATA[config["name"]](**options)


def require(holds: bool, key: str, value: Any, takes: str) -> None:
    """Raise `ConfigError` about `data.<key>` unless `holds`."""
    if not holds:
        raise ConfigError(f"data.{key}: got {value!r}, takes {takes}")
