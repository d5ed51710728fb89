"""Where real images come from: `open_source(name, split, directory)`.

A source is random access by integer array, so the position of a run in its data is one integer.
"""

import dataclasses
import os
import zlib

import numpy as np
from etils import epath

from ddo_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class ArraySource:
    """Examples held in memory: image uint8 (or float32 latents) [N, ...], label int32 [N]."""

    name: str
    images: np.ndarray
    labels: np.ndarray
    num_classes: int

    def __len__(self) -> int:
        return len(self.images)

    @property
    def fingerprint(self) -> str:
        """CRC-32 of the content, eight hex digits: names the data in every record."""
        crc = zlib.crc32(np.ascontiguousarray(self.images))
        return f"{zlib.crc32(np.ascontiguousarray(self.labels), crc):08x}"

    def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        return {"image": self.images[indices], "label": self.labels[indices]}


def data_dir(directory: str | None) -> epath.Path:
    """The config's directory, else $TFDS_DATA_DIR, else TFDS's own default ~/tensorflow_datasets."""
    return epath.Path(directory or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def open_digits(split: str, directory: str | None) -> ArraySource:
    """The project's TFDS builder, prepared on first use (2 s), read back whole as a data source."""
    import tensorflow_datasets as tfds
    from absl import logging

    from ddo_jax.data.digits import DdoDigits

    tfds.disable_progress_bar()
    builder = DdoDigits(data_dir=data_dir(directory), file_format="array_record")
    try:
        builder.download_and_prepare()
    except ImportError as e:
        raise UserError(f"dataset 'digits' needs scikit-learn ({e}): python -m pip install -e '.[demo]'") from None
    except OSError as e:
        raise UserError(
            f"data directory {data_dir(directory)}: {e.strerror or e}; set --config.data.dir or TFDS_DATA_DIR"
        ) from None
    try:
        data = builder.as_data_source(split)
    except ValueError:
        known = ", ".join(sorted(builder.info.splits))
        raise UserError(f"split {split!r} of dataset 'digits'; allowed: {known}") from None
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)  # TFDS recommends OpenCV over Pillow: no matter for 2,000 images
    records = data.__getitems__(range(len(data)))
    logging.set_verbosity(verbosity)
    return ArraySource(
        name=f"digits:{split}",
        images=np.stack([r["image"] for r in records]),
        labels=np.array([r["label"] for r in records], np.int32),
        num_classes=10,
    )


SOURCES = {"digits": open_digits}


def open_source(name: str, split: str, directory: str | None = None) -> ArraySource:
    """Open a dataset by name.

    Raises:
      UserError: unknown name (the known ones are listed) or a directory that cannot be used.
    """
    if name not in SOURCES:
        raise UserError(f"config.data.name: {name!r}; allowed: {', '.join(sorted(SOURCES))}")
    return SOURCES[name](split, directory)
