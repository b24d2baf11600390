"""stable-pretraining's MAE."""

from peer import Peer, recipe
from stable_pretraining import methods as theirs
from torch import nn


class MAE(Peer):
    """stable-pretraining's MAE; its decoder is as wide as the encoder, with 4 blocks, as in its script for ViT-S."""

    recipe = recipe(5e-4, 128)

    def theirs(self, vit: nn.Module) -> nn.Module:
        sizes = {"decoder_embed_dim": self.student.embed_dim, "decoder_num_heads": self.student.num_heads}
        return theirs.MAE(vit, decoder_depth=4, mask_ratio=0.75, **sizes)
