"""stable-pretraining's SwAV."""

from types import MappingProxyType
from typing import Any

from peer import Peer, recipe, two_and_four_views
from stable_pretraining import methods as theirs
from torch import Tensor, nn

from data2vec_vision.transforms import ViewTransform
from data2vec_vision.vit import MaskedVisionTransformer


class ClassToken(nn.Module):
    """The class token that a backbone gives: timm's model without a pool gives all tokens, of one size of image."""

    def __init__(self, student: MaskedVisionTransformer):
        super().__init__()
        self.student = student

    def forward(self, images: Tensor) -> Tensor:
        return self.student.encode(images).prefix[:, 0]


class SwAV(Peer):
    """stable-pretraining's SwAV, with two large and four small crops."""

    recipe = recipe(5e-4, 128)
    pool = "cls"
    view_names = MappingProxyType({"global_views": 2, "local_views": None})

    def theirs(self, vit: nn.Module) -> nn.Module:
        return theirs.SwAV(ClassToken(self.student), n_prototypes=3000, epsilon=0.05)

    def loss(self, views: list[Tensor]) -> Any:
        return self.peer(global_views=views[:2], local_views=views[2:])

    def views(self) -> ViewTransform:
        return two_and_four_views(self.student)
