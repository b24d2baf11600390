"""stable-pretraining's MSN."""

from types import MappingProxyType

from peer import Peer, recipe, two_views
from stable_pretraining import methods as theirs
from torch import nn

from data2vec_vision.transforms import ViewTransform


class MSN(Peer):
    """stable-pretraining's MSN."""

    recipe = recipe(5e-4, 256)
    pool = "cls"
    view_names = MappingProxyType({"anchor": 1, "target": 1})

    def theirs(self, vit: nn.Module) -> nn.Module:
        return theirs.MSN(vit, n_prototypes=1024, mask_ratio=0.6, image_size=self.student.image_size[0])

    def views(self) -> ViewTransform:
        return two_views(self.student)
