"""Reading a data set as it comes: from the hub, or from local files."""

from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError

DataFiles = str | list[str] | dict[str, str | list[str]]

_BUILDER_OF_SUFFIX = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
_BUILDERS = {*_BUILDER_OF_SUFFIX.values(), "imagefolder"}
_READERS = {"csv": DatasetDict.from_csv, "json": DatasetDict.from_json, "parquet": DatasetDict.from_parquet}


def load_splits(
    dataset: str, config: str | None = None, data_files: DataFiles | None = None, revision: str | None = None
) -> DatasetDict:
    """Read every split there is.

    Args:
        dataset: a hub name, a local folder (of images, csv, json or parquet), a local file, or one of the builders of
            `datasets` (`csv`, `json`, `parquet`, `imagefolder`) together with `data_files`.
        config: the configuration of a hub data set that has several.
        data_files: files by split, or files of a single split.
        revision: the version of a hub data set.

    """
    path = Path(dataset)
    if revision is not None and (path.exists() or (dataset in _BUILDERS and data_files is not None)):
        raise ValueError(
            f"A revision is for a data set on the hub, and {dataset!r} is read from files: leave out {revision!r}."
        )
    builder = _BUILDER_OF_SUFFIX.get(path.suffix.lower())
    if path.is_file() and builder is None:
        raise ValueError(f"Expected a file that ends in {', '.join(_BUILDER_OF_SUFFIX)}, got {dataset!r}.")
    if builder is not None:
        if not path.is_file():
            raise FileNotFoundError(f"Expected a file at {dataset!r}, found none.")
        if data_files is not None:
            raise ValueError(f"Expected data_files with dataset={builder!r}, not together with the file {dataset!r}.")
        dataset, data_files = builder, dataset
    if dataset in _READERS and data_files is not None:
        if config is not None:
            raise ValueError(f"Expected config for a data set on the hub, not for files, got {config!r}.")
        by_split = data_files if isinstance(data_files, dict) else {"train": data_files}
        try:
            return _READERS[dataset](by_split)  # unlike load_dataset, this does not look for the network
        except (DatasetGenerationError, ValueError) as error:
            if isinstance(error.__cause__, OSError):  # the system's, not the file's
                raise
            files = ", ".join(map(str, by_split.values()))
            raise ValueError(f"Expected rows in {files}, which cannot be read: {error.__cause__ or error}") from error
    splits = load_dataset(dataset, config, data_files=data_files, revision=revision)
    assert isinstance(splits, DatasetDict)
    return splits


def pick_splits(found: DatasetDict, train: str, validation: str | None, test: str | None) -> DatasetDict:
    """Choose which of the splits found serve as train, validation and test.

    Args:
        found: what `load_splits` returned.
        train: name of the training split.
        validation: name of the validation split, `auto` for the one called so if there is one, None for none.
        test: likewise.

    """
    wanted = {"train": train, "validation": validation, "test": test}
    picked: dict[str, Dataset] = {}
    for role, name in wanted.items():
        name = role if name == "auto" and role in found else name
        if name is None or name == "auto":
            continue
        if name not in found:
            raise ValueError(f"Expected one of the splits {', '.join(found)} as {role}_split, got {name!r}.")
        picked[role] = found[name]
    return DatasetDict(picked)
