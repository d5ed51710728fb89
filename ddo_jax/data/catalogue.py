"""Prepared TFDS sets of images (array_record), read and written without TensorFlow.

Nothing here looks at the network: without one TFDS waits for minutes before it says so.
"""

import functools
import re
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from etils import epath

from ddo_jax import files
from ddo_jax.data.archives import WHOLE_READ, files_crc
from ddo_jax.data.tree import warn
from ddo_jax.errors import UserError

VERSION = re.compile(r"\d+\.\d+\.\d+")
SHARD_BYTES = 2**29


def find(name: str, root: epath.Path) -> epath.Path:
    """The directory <root>/<name>[/<config>]/<version> of a prepared set; the highest version.

    Args:
      name: "cifar10", "imagenet_resized/64x64", "cifar10:3.0.2", or the path of a set's directory.

    Raises:
      UserError: there is none; says how to prepare it.
    """
    base, _, version = name.rpartition(":")
    if not VERSION.fullmatch(version):  # a colon of a path
        base, version = name, ""
    directory = files.literal(root / epath.Path(base).expanduser())  # `root` is dropped if `base` is an absolute path
    for candidate in (directory, files.literal(base)):
        if (candidate / version / "dataset_info.json").exists():
            return candidate / version
    versions = [p for p in files.matching(directory, "*") if VERSION.fullmatch(p.name)]
    found = [p for p in versions if (p / "dataset_info.json").exists()]
    if version or not found:
        raise UserError(
            f"tfds:{name}: not prepared in {root}; prepare it once where there is a network: "
            f"pip install -e '.[prepare]' && python -c \"import tensorflow_datasets as t; "
            f"t.builder('{name}', data_dir='{root}', file_format='array_record').download_and_prepare()\"; "
            f"or from images of your own: python -m ddo_jax.data SRC {directory / '1.0.0'}"
        )
    return max(found, key=lambda p: tuple(map(int, p.name.split("."))))


class TfdsRecords:
    """Encoded images of a prepared TFDS set with the features "image" and, if it has classes, "label"."""

    latents = False  # only zips and folders hold them

    def __init__(self, name: str, split: str, root: epath.Path):
        import tensorflow_datasets as tfds

        directory = find(name, root)
        try:
            builder = tfds.builder_from_directory(directory)
        except Exception as e:  # protobuf's errors have no common base
            raise UserError(f"{directory}: not a TFDS set ({_line(e)}); move it aside and prepare it again") from None
        features, file_format = dict(builder.info.features or {}), builder.info.file_format.value
        if file_format != "array_record":
            raise UserError(f"{directory}: prepared as {file_format}; allowed: array_record (random access)")
        if not isinstance(features.get("image"), tfds.features.Image):
            raise UserError(
                f"{directory}: features {', '.join(features)}; an Image named 'image' is needed "
                "(latents are read from zips and folders only)"
            )
        label = features.get("label")
        classes = isinstance(label, tfds.features.ClassLabel)
        self.num_classes = label.num_classes if classes else 0
        names = tuple(label.names or ()) if classes else ()
        self.class_names = () if names == tuple(map(str, range(len(names)))) else names  # TFDS's word for unnamed
        self.name = f"tfds:{builder.info.full_name}:{split}"
        try:
            paths = builder.info.splits[split].filepaths
            self._paths = [epath.Path(p) for p in paths]
            self._data = builder.as_data_source(split, decoders={"image": _skip()})
        except (ValueError, KeyError) as e:
            known = ", ".join(sorted(builder.info.splits))
            raise UserError(f"split {split!r} of {directory}: {_line(e)}; allowed: {known}, or parts of them") from None
        except OSError as e:
            raise UserError(f"{directory}: {_line(e)}; prepare it again") from None
        if "[" in split and self.num_classes > 1:
            self._check_part(builder, split)

    def _check_part(self, builder, split: str) -> None:
        """Warn of a part that leaves a class out: TFDS cuts a set as it lies, which may be sorted by class."""
        whole = split.partition("[")[0]
        try:
            data = builder.as_data_source(whole, decoders={"image": _skip()})
        except (ValueError, KeyError):  # a sum of parts: TFDS took it, what the whole would be is not known
            return
        if self.labels is None or (labels := self._read_labels(data)) is None:
            return
        left_out = sorted(set(labels.tolist()) - set(self.labels.tolist()))
        if left_out:
            warn(
                f"{self.name}: no image of class {left_out[0]} ({len(left_out)} such classes), which {whole} has; TFDS "
                f"cuts a set as it lies: make a zip from {whole} with python -m ddo_jax.data and split that, per class"
            )

    @functools.cached_property
    def labels(self) -> np.ndarray | None:
        """int32 [N]; None where the files exceed 1 GiB and are not read for it."""
        return self._read_labels(self._data)

    def _read_labels(self, data) -> np.ndarray | None:
        if not self.num_classes:
            return np.zeros(len(data), np.int32)
        if sum(path.stat().length for path in self._paths) > WHOLE_READ:
            return None
        blocks = (data.__getitems__(range(i, min(i + 4096, len(data)))) for i in range(0, len(data), 4096))
        try:
            labels = np.array([record.get("label", -1) for block in blocks for record in block], np.int32)
        except (OSError, ValueError, RuntimeError, IndexError, TypeError, OverflowError):
            return None  # damaged: reading its images will name it
        return labels if np.all((labels >= 0) & (labels < self.num_classes)) else None

    def __len__(self) -> int:
        return len(self._data)

    def where(self, i: int) -> str:
        return f"{self.name} example {i}"

    def read(self, indices: list[int]) -> list[tuple[bytes, int]]:
        try:
            records = self._data.__getitems__(indices)  # one by one would be 12 times slower
        except (OSError, ValueError, RuntimeError, IndexError) as e:
            if len(indices) > 1:  # which of them?
                return [self.read([i])[0] for i in indices]
            raise UserError(f"{self.where(indices[0])}: damaged ({_line(e)}); {self._mend()}") from None
        found = []
        for i, record in zip(indices, records, strict=True):
            image, label = record.get("image"), record.get("label") if self.num_classes else 0
            if not image or label is None:  # a torn shard reads as empty records
                raise UserError(f"{self.where(i)}: damaged (empty); {self._mend()}")
            found.append((image, int(label)))
        return found

    def _mend(self) -> str:
        return f"prepare {self._paths[0].parent} again"

    @property
    def fingerprint(self) -> str:
        """Of the split's files (up to 1 GiB; beyond, of their sizes) and the split."""
        return files_crc(self._paths, zlib.crc32(self.name.encode()))


def _skip():
    """TFDS's word for "encoded, as stored"."""
    import tensorflow_datasets as tfds

    return tfds.decode.SkipDecoding()


def _line(e: Exception) -> str:
    return (str(e).splitlines() or [type(e).__name__])[0][:200]


def write(
    directory: Path, examples: Iterable[tuple[bytes, int]], n: int, shape, num_classes: int, names: tuple = ()
) -> None:
    """Write a prepared set with one split, "train".

    Args:
      directory: <root>/<name>/<version>; is made. examples: n pairs (PNG, label).
      shape: (H, W, C) of all images. num_classes: 0 leaves the labels out. names: of the classes, by id.
    """
    import tensorflow_datasets as tfds
    from array_record.python import array_record_module
    from tensorflow_datasets.core import example_serializer  # semi-private: kept in this one function

    features = {"image": tfds.features.Image(shape=tuple(shape), encoding_format="png")}
    if num_classes:
        features["label"] = (
            tfds.features.ClassLabel(names=list(names)) if names else tfds.features.ClassLabel(num_classes=num_classes)
        )
    features = tfds.features.FeaturesDict(features)
    serializer = example_serializer.ExampleSerializer(features.get_serialized_info())
    directory.mkdir(parents=True)
    name = directory.parent.name
    shards = max(1, min(n, -(-n * shape[0] * shape[1] * shape[2] // SHARD_BYTES)))
    lengths = [n * (s + 1) // shards - n * s // shards for s in range(shards)]
    examples, num_bytes = iter(examples), 0
    for s, length in enumerate(lengths):
        path = directory / f"{name}-train.array_record-{s:05d}-of-{shards:05d}"
        writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
        try:
            for _ in range(length):
                png, label = next(examples)
                example = {"image": png} | ({"label": label} if num_classes else {})
                record = serializer.serialize_example(features.encode_example(example))
                num_bytes += len(record)
                writer.write(record)
        finally:
            writer.close()
    template = tfds.core.ShardedFileTemplate(
        data_dir=directory, dataset_name=name, split="train", filetype_suffix="array_record"
    )
    split = tfds.core.SplitInfo(name="train", shard_lengths=lengths, num_bytes=num_bytes, filename_template=template)
    # check_data=True would need TensorFlow
    tfds.folder_dataset.write_metadata(data_dir=directory, features=features, split_infos=[split], check_data=False)
