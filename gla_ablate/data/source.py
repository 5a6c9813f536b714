"""What a data source is: a name, typed options, a vocabulary, and two map-style data sets of fixed-length rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from gla_ablate.errors import ConfigError
from gla_ablate.registry import Registry

IGNORED = -100  # a target that no loss and no metric counts; the default of torch's cross entropy


class Rows(Dataset[dict[str, Tensor]], ABC):
    """Rows of `seq_len` tokens. `rows[i]` is one row, `rows[[i, j, …]]` a batch read at once.

    Both give `{"inputs": int64 [..., seq_len], "targets": int64 [..., seq_len]}`; `targets[..., t]` is what the model
    should predict after reading `inputs[..., : t + 1]`, or `IGNORED`.
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
    labelled_share: float = 1.0  # of tokens, with a target that counts

    def __init__(self, seq_len: int, batch_size: int, val_tokens: int) -> None:
        """`batch_size` rows of `seq_len` tokens a training step; validation reads `val_tokens` tokens at most, so that
        trials with another batch size are judged on the same rows. Raises `ConfigError` for a size below one row."""
        require(seq_len >= 1, "seq_len", seq_len, "at least 1")
        require(batch_size >= 1, "batch_size", batch_size, "at least 1")
        require(val_tokens >= seq_len, "val_tokens", val_tokens, f"at least one row of {seq_len} tokens")
        self.seq_len = seq_len
        self.batch_size = batch_size
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


def build_source(config: dict[str, Any]) -> DataSource:
    """The source that a resolved `data:` part describes."""
    options = {key: value for key, value in config.items() if key != "name"}
    return DATA[config["name"]](**options)


def require(holds: bool, key: str, value: Any, takes: str) -> None:
    """Raise `ConfigError` about `data.<key>` unless `holds`."""
    if not holds:
        raise ConfigError(f"data.{key}: got {value!r}, takes {takes}")
