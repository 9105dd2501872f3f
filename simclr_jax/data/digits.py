"""scikit-learn's handwritten digits as a TFDS data set: 1797 images of 8 x 8 pixels, no download."""

import numpy as np
import tensorflow_datasets as tfds


class Digits(tfds.core.GeneratorBasedBuilder):
    """80 % of each class for training, the rest for testing, by a fixed shuffle."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description="Handwritten digits of the UCI ML repository, as scikit-learn ships them.",
            homepage="https://archive.ics.uci.edu/dataset/80",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1)),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager):
        # Imported here: only preparing the data set needs scikit-learn.
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        data = load_digits()
        images = np.round(data.images * (255 / 16)).astype(np.uint8)[..., np.newaxis]
        train, test = train_test_split(
            np.arange(len(images)), test_size=0.2, random_state=0, stratify=data.target
        )
        return {
            "train": self._generate_examples(images, data.target, train),
            "test": self._generate_examples(images, data.target, test),
        }

    def _generate_examples(self, images, labels, indices):
        for i in indices:
            yield int(i), {"image": images[i], "label": int(labels[i])}
