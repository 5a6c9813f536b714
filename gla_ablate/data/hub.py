"""Any text data set of the Hugging Face hub, or a local folder in the same layout."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gla_ablate.data.cache import cache_folder, short_hash
from gla_ablate.data.corpus import ByteCorpus, Document, Split, file_states
from gla_ablate.data.packing import hashed_to_validation
from gla_ablate.data.source import DATA, require
from gla_ablate.errors import ConfigError, nearest

if TYPE_CHECKING:
    import datasets


@DATA.register("hub")
class Hub(ByteCorpus):
    """Column `column` of the data set that `datasets.load_dataset(path, subset, split=split)` gives, a document a row.

    Validation is `val_split`; without one, about `val_fraction` of the rows by a hash of their position. Nulls are
    passed over, text is read as UTF-8 bytes. `HF_HOME` and `HF_HUB_OFFLINE` mean what they do everywhere.
    """

    name = "hub"

    def __init__(
        self,
        *,
        seq_len: int = 256,
        batch_size: int = 8,
        val_tokens: int = 65_536,
        path: str,
        subset: str | None = None,
        split: str = "train",
        val_split: str | None = None,
        column: str = "text",
        val_fraction: float = 0.05,
    ) -> None:
        super().__init__(seq_len, batch_size, val_tokens)
        require(0 < val_fraction < 1, "val_fraction", val_fraction, "a fraction between 0 and 1")
        self.path = path
        self.subset = subset
        self.split = split
        self.val_split = val_split
        self.column = column
        self.val_fraction = val_fraction

    def identity(self) -> Any:
        # Arrow files of `datasets` lie under a hash of the builder, its options and the revision of the data.
        files = {split: self._load(split).cache_files for split in self._splits()}
        return [files, self.split, self.val_split, self.column, None if self.val_split else self.val_fraction]

    def documents(self, split: Split) -> Iterator[Document]:
        rows = self._load(self.val_split if split == "val" and self.val_split else self.split)
        texts = (text for batch in rows.iter(batch_size=1000) for text in batch[self.column])
        for index, text in enumerate(texts):
            other_split = not self.val_split and hashed_to_validation(str(index), self.val_fraction) != (split == "val")
            if text is not None and not other_split:
                yield [text if isinstance(text, bytes) else text.encode()]

    def _splits(self) -> list[str]:
        return [self.split, self.val_split] if self.val_split else [self.split]

    def _load(self, split: str) -> datasets.Dataset:
        """The text column of a split. Raises `ConfigError` for what the hub doesn't have or can't be asked for."""
        import datasets

        datasets.disable_progress_bars()  # a trial's output is a log
        try:
            rows = datasets.load_dataset(self.path, self.subset, split=split, cache_dir=local_cache(self.path))
        except (
            FileNotFoundError,
            ConnectionError,
            ValueError,
        ) as error:  # no such data set; no network; no such subset or split
            wanted = f"{self.path!r}, subset {self.subset!r}, split {split!r}"
            raise ConfigError(f"data.path: cannot load {wanted}: {str(error).splitlines()[0]}") from None
        kind = getattr(rows.features.get(self.column), "dtype", None)
        if kind not in ("string", "large_string", "binary", "large_binary"):
            columns = rows.column_names
            hint = nearest(self.column, columns)
            raise ConfigError(
                f"data.column: got {self.column!r}, takes a column of text{hint} (valid: {', '.join(columns)})"
            )
        return rows.select_columns(self.column)


def local_cache(path: str) -> str | None:
    """Where `datasets` should keep what it makes of a local folder; None, its own place, for a name on the hub.

    It notices a new revision of the hub, but not a changed file in a local folder whose card names subsets. So a folder
    gets one cache for each state of its files.
    """
    folder = Path(path)
    if not folder.is_dir():
        return None
    states = file_states(sorted(file for file in folder.rglob("*") if file.is_file()))
    return str(cache_folder() / "hub" / short_hash(states))
