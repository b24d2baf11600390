"""stable-pretraining's Data2Vec."""

from peer import Peer, recipe
from stable_pretraining import methods as theirs
from torch import nn


class Data2Vec(Peer):
    """stable-pretraining's Data2Vec."""

    recipe = recipe(1.5e-3, 128)
    betas = (0.9, 0.98)

    def theirs(self, vit: nn.Module) -> nn.Module:
        return theirs.Data2Vec(
            vit,
            top_k_blocks=self.student.depth,
            mask_ratio=0.6,
            ema_decay_start=0.9998,
            ema_decay_end=1.0,
            image_size=self.student.image_size[0],
        )
