"""scikit-learn's 8x8 digits as a TFDS dataset: 1437 train and 360 test images, stratified.

No TensorFlow: images are handed to TFDS as encoded PNG bytes and stored as array_record. Pixels keep
their original 17 levels 0..16 (uint8), so that a model's samples can be quantised exactly like the data.
Source: UCI "Optical Recognition of Handwritten Digits", as shipped with scikit-learn (CC BY 4.0).
"""

import numpy as np
import tensorflow_datasets as tfds

from ddo_jax.data.images import encode_png

TEST_IMAGES = 360


class DdoDigits(tfds.core.GeneratorBasedBuilder):
    """8x8 grey digits, 10 classes, pixel values 0..16."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description=__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager):
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        train, test = train_test_split(
            np.arange(len(digits.target)), test_size=TEST_IMAGES, stratify=digits.target, random_state=0
        )
        images = digits.images.astype(np.uint8)[..., None]
        return {
            "train": self._generate_examples(images, digits.target, np.sort(train)),
            "test": self._generate_examples(images, digits.target, np.sort(test)),
        }

    def _generate_examples(self, images, labels, indices):
        for i in indices:
            yield int(i), {"image": encode_png(images[i]), "label": int(labels[i])}
