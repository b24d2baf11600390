"""stable-pretraining's IJEPA."""

from peer import Peer, recipe
from stable_pretraining import methods as theirs
from torch import nn

from data2vec_vision.transforms import Views, ViewTransform, augmentation


class IJEPA(Peer):
    """stable-pretraining's IJEPA; its predictor is as wide as the encoder and as deep, as in its script for ViT-S."""

    recipe = recipe(1e-3, 64, 0.04)
    class_token = False

    def theirs(self, vit: nn.Module) -> nn.Module:
        return theirs.IJEPA(vit, predictor_embed_dim=self.student.embed_dim, predictor_depth=self.student.depth)

    def views(self) -> ViewTransform:
        return Views(augmentation(self.student.image_size, (0.3, 1.0), 0.0))
