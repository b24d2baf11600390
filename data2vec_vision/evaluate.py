"""How good an encoder's features are, told by labels that training never saw."""

import math

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from data2vec_vision.errors import InputError
from data2vec_vision.extract import feature_function, image_loader
from data2vec_vision.features import Selected
from data2vec_vision.labels import labels_of, stratified_split
from data2vec_vision.probes import accuracy, knn_classify
from data2vec_vision.run import say
from data2vec_vision.seeding import generator
from data2vec_vision.sources import open_source
from data2vec_vision.transforms import ImageTransform
from data2vec_vision.vit import MaskedVisionTransformer

BATCH = 64  # images in a forward pass of KnnProbe
KEPT_BYTES = 10**9  # of decoded images that KnnProbe keeps in memory


class KnnProbe:
    """kNN accuracy of an encoder that is being trained, on the same labelled images every time.

    Of at most `max_images` images below `path`, drawn under `seed`, a stratified fifth is classified by the others.
    They are decoded once and kept as bytes where that takes less than KEPT_BYTES. Raises InputError for a folder
    without labels, with one class only, or without two readable images of a class.
    """

    def __init__(
        self,
        path: str,
        transform: ImageTransform,
        labels_file: str | None = None,
        k: int = 20,
        max_images: int = 10_000,
        seed: int = 0,
        workers: int | None = None,
    ):
        source = open_source(path)
        found = labels_of(source, labels_file)
        labelled = np.flatnonzero(found.numbers >= 0)
        order = torch.randperm(len(labelled), generator=generator(seed, "images")).numpy()
        chosen = Selected(source, np.sort(labelled[order[:max_images]]))
        self.transform = transform
        loader = image_loader(chosen, transform, BATCH, workers)
        keep = 3 * len(chosen) * math.prod(transform.image_size) <= KEPT_BYTES
        batches, bad = [], set()
        for pixels, unreadable in loader:
            bad |= set(unreadable)
            if keep and pixels is not None:
                batches.append(pixels)
        self._batches: list[Tensor] | DataLoader = batches if keep else loader
        numbers = np.delete(found.numbers[np.asarray(chosen.indices)], sorted(bad))
        self.labels, present = torch.from_numpy(numbers), len(np.unique(numbers))
        if present < 2:
            raise InputError(
                f"{path} has readable images of {present} class{'es' * (present == 0)}; it takes two or more"
            )
        self.train, self.test = map(torch.from_numpy, stratified_split(numbers, 0.2, seed))
        if len(self.test) == 0:
            raise InputError(f"{path} has no class with two images; one is needed to classify the other")
        self.k = min(k, len(self.train))
        if bad:
            say(f"{len(bad):,} of the labelled images in {path} could not be read and are left out.")
        if self.k < k:
            say(f"kNN on {path}: k = {self.k}, for there are no more training images.")

    def probe(
        self,
        encoder: MaskedVisionTransformer,
        device: torch.device,
        precision: str = "fp32",
        pool: str | None = None,
    ) -> float:
        """The accuracy of `encoder` on `device` in per cent, nan when its features are not finite or images have gone.

        It is evaluated in eval mode and left in the mode it was in; no random state is touched.
        """
        modes = [(module, module.training) for module in encoder.modules()]
        fused = [(module, module.fused_attn) for module in encoder.modules() if hasattr(module, "fused_attn")]
        compute = feature_function(encoder.eval(), device, pool, None, precision)
        try:
            batches = self._batches if isinstance(self._batches, list) else (pixels for pixels, _ in self._batches)
            features = torch.cat([compute(pixels) for pixels in batches if pixels is not None])
        finally:
            for module, mode in modes:
                module.training = mode
            for attention, was in fused:
                attention.fused_attn = was
        if len(features) != len(self.labels):
            say("Some images of the kNN's can no longer be read: there is no accuracy this time.")
            return math.nan
        if not features.isfinite().all():
            return math.nan
        predicted, _ = knn_classify(
            features[self.train], self.labels[self.train], features[self.test], self.k, device=device
        )
        return accuracy(predicted, self.labels[self.test])
