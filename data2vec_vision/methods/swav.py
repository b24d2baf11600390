"""SwAV: each large crop is assigned to prototypes, and every other crop of the image must predict that assignment.

Caron et al. 2020, "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments", section 3.
Shapes: B batch, V views, D width, E width of the projections, C prototypes, L queue.

What differs from the paper: its epsilon of 0.05 and its harder views collapsed to uniform assignments within 100 steps
on batches of 64 small images, so the defaults are what its authors advise then: a lower epsilon, easier views, fewer
prototypes. AdamW takes the place of SGD with LARC, which is for ResNets; prototypes, biases and norms are not decayed.

There is no teacher. Batch norm and Sinkhorn are over the images of one forward pass in all processes,
and for Sinkhorn the queue: gradient accumulation does not enlarge what they see, the queue does.
"""

from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data2vec_vision import distributed
from data2vec_vision.config import Facts, default_prototypes
from data2vec_vision.distributed import BatchNorm
from data2vec_vision.knobs import knob
from data2vec_vision.methods.base import Method, Output, by_resolution
from data2vec_vision.prototypes import Prototypes, mean_entropy_gap, prototype_use, sinkhorn
from data2vec_vision.recipes import VIT_B, PaperRecipe
from data2vec_vision.targets import at_least_fp32
from data2vec_vision.transforms import ViewTransform, local_crop_count, multi_crop
from data2vec_vision.vit import pooled


class SwAV(Method):
    """SwAV (Caron et al. 2020): predict the prototypes of one view from all other views."""

    @dataclass(frozen=True)
    class Config(Method.Config):
        n_local: int | None = knob(None, "small crops an image; none: 6, fewer on small images", "[0, 1000]", "6")
        n_prototypes: int = knob(256, "how many prototypes", "[2, inf)", "3000")
        temperature: float = knob(0.1, "temperature of the predictions", "(0, inf)", "0.1")
        epsilon: float = knob(0.03, "temperature of the assignments", "(0, inf)", "0.05")
        queue_length: int = knob(512, "earlier images that Sinkhorn sees too; 0: none", "[0, inf)", "3840 at batch 256")
        queue_start: float = knob(0.15, "share of the run after which the queue fills", "[0, 1]", "15 epochs")
        freeze_prototypes: float = knob(
            0.01, "share of the run in which the prototypes are frozen", "[0, 1)", "1 epoch"
        )
        head_dim: int = knob(2048, "width of the head's hidden layer", "[1, inf)", "2048")
        projection_dim: int = knob(128, "width of what is compared with the prototypes", "[1, inf)", "128")
        crop_min: float = knob(0.3, "smallest share of the image in the two large crops", "(0, 1]", "0.14")
        local_min: float = knob(0.05, "smallest share of the image in a small crop", "(0, 1]", "0.05")
        color_jitter: float = knob(0.5, "strength of the colour jitter", "[0, 1]", "1")
        blur: float = knob(0.5, "probability of a blur", "[0, 1]", "0.5")
        flip: float = knob(0.5, "probability of a mirror image", "[0, 1]", "0.5")

    # The paper's SGD with LARC is for ResNets; AdamW is what DINO trained SwAV's ViT with.
    recipe = MappingProxyType({"max_lr_at_256": 5e-4, "warmup_pct": 0.1, "weight_decay": 0.05, "clip_grad": 3.0})
    paper = PaperRecipe(
        "Caron et al. 2020, ResNet-50, 400 epochs at batch 256; AdamW as in Caron et al. 2021 (DINO)",
        options=VIT_B | dict(
            epochs=400, batch_size=256, max_lr=5e-4, warmup_pct=10 / 400, weight_decay=0.05, clip_grad=0.0
        ),
        knobs=dict(
            n_local=6, n_prototypes=3000, temperature=0.1, epsilon=0.05, queue_length=3840, queue_start=15 / 400,
            freeze_prototypes=1 / 400, head_dim=2048, projection_dim=128, crop_min=0.14, local_min=0.05,
            color_jitter=1.0, blur=0.5, flip=0.5
        ),
        notes=(
            "The paper has no ViT: views, prototypes, queue and length are its ResNet-50's at batch 256. Its SGD with "
            "LARC is not here; AdamW at 5e-4 x batch / 256, with ten epochs of warm-up, a decay of 0.05 and no "
            "clipping, is what DINO's author tells of her ViTs by other methods (facebookresearch/dino, issue 34). "
            "The rate is one-cycle instead of a cosine."
        ),
    )  # fmt: skip
    pool = "cls"
    view_names = MappingProxyType({"global_views": 2, "local_views": None})
    batch_statistics = "batch norm and, beside the queue, Sinkhorn"

    queue: Tensor

    @classmethod
    def derived(cls, facts: Facts) -> dict[str, tuple[Any, str]]:
        count = default_prototypes(facts.n_images, most=256)
        return {} if count == 256 else {"n_prototypes": (count, f"for {facts.n_images:,} images")}

    def build(self) -> None:
        c, student = self.config, self.student
        self.n_local = local_crop_count(student.grid, 6) if c.n_local is None else c.n_local
        self.head = nn.Sequential(
            nn.Linear(student.embed_dim, c.head_dim, bias=False),  # the norm would remove a bias
            BatchNorm(c.head_dim),
            nn.ReLU(),
            nn.Linear(c.head_dim, c.projection_dim),
        )
        self.prototypes = Prototypes(c.n_prototypes, c.projection_dim)
        self.prototypes.renormalize()
        # Projections of the two large crops of the images last seen, newest first; the same in every process.
        self.register_buffer("queue", torch.zeros(2, c.queue_length, c.projection_dim))
        self.queued = 0  # images in the queue so far
        self.queue_full = False  # a flag of its own, so that a compiled step does not depend on the number
        self._waiting: list[Tensor] = []  # projections [b, 2, E] of this step, which join the queue after it

    def describe(self) -> str:
        c = self.config
        queue = f", balanced with the last {c.queue_length} images" if c.queue_length else ""
        return (
            f"2 views and {self.n_local} small crops an image; each of the 2 views is assigned to {c.n_prototypes} "
            f"prototypes{queue}, and all others predict that"
        )

    def views(self) -> ViewTransform:
        c, student = self.config, self.student
        look = {"flip": c.flip, "color_jitter": c.color_jitter, "blur": c.blur}
        return multi_crop(student.image_size, student.patch_size, self.n_local, c.crop_min, c.local_min, **look)

    def training_step(self, views: list[Tensor], masks: dict[str, Tensor]) -> Output:
        V, B = len(views), len(views[0])
        encoded = [self.student.encode(crops) for crops in by_resolution(views)]
        feature = torch.cat([pooled(e, self.student.pool) for e in encoded])  # view by view: [V*B, D]
        z = F.normalize(at_least_fp32(self.head(feature)), dim=1)  # one batch norm over all crops: [V*B, E]
        self.prototypes.renormalize()
        scores = self.prototypes.scores(z).view(V, B, -1)
        log_p = (scores / self.config.temperature).log_softmax(dim=2)
        codes = torch.stack([self.codes(scores[i].detach(), i) for i in range(2)])  # [2, B, C]
        loss = swapped_prediction(log_p, codes)
        if self.config.queue_length:
            self._wait_for_queue(z.detach().view(V, B, -1)[:2].transpose(0, 1))
        logs = prototype_use(codes.flatten(0, 1), mean_entropy_gap(log_p[:2].detach().flatten(0, 1)))
        extras = {"scores": scores, "codes": codes, "projection": z.view(V, B, -1)}
        return Output(loss, feature[:B].detach(), logs, extras)

    @torch.no_grad()
    def codes(self, scores: Tensor, crop: int) -> Tensor:
        """The balanced assignments of one large crop, 0 or 1: scores [B, C] -> [B, C], rows sum to one (section 3.1).

        A full queue takes part in the balance, scored with the present prototypes; each process brings its share of it.
        """
        B = len(scores)
        if self.queue_full:
            share = self.queue[crop, distributed.rank() :: distributed.processes()].to(scores.dtype)
            scores = torch.cat([scores, self.prototypes.scores(share)])
        return sinkhorn(scores / self.config.epsilon)[:B]

    def _wait_for_queue(self, projections: Tensor) -> None:
        """Keep [b, 2, E] for `after_step`, not more of them than the queue holds."""
        self._waiting.append(projections)
        while sum(len(p) for p in self._waiting[1:]) >= self.config.queue_length:
            self._waiting.pop(0)

    def before_step(self, progress: float) -> None:
        super().before_step(progress)
        if progress <= self.config.freeze_prototypes:
            self.prototypes.weight.grad = None  # not zero: the optimizer's moments and decay would still move them

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        super().after_step(progress)
        waiting, self._waiting = self._waiting, []
        if progress < self.config.queue_start or not waiting:
            return
        # In the order of the stream; a pass that was not finite must not spoil the passes to come.
        new = torch.cat([distributed.gather(p) for p in waiting]).nan_to_num().flip(0).transpose(0, 1)
        self.queue = torch.cat([new.to(self.queue.dtype), self.queue], dim=1)[:, : self.config.queue_length].clone()
        self._set_queued(min(self.queued + new.shape[1], self.config.queue_length))

    def _set_queued(self, count: int) -> None:
        self.queued, self.queue_full = count, 0 < self.config.queue_length <= count

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.queued)

    def set_extra_state(self, state: Tensor) -> None:
        self._set_queued(int(state))


def swapped_prediction(log_p: Tensor, codes: Tensor) -> Tensor:
    """Mean cross entropy of each code with every view but its own (equation 1, for multi-crop section 3.2).

    log_p [V, B, C] are the log-predictions of the views, codes [2, B, C] the assignments of the first two.
    """
    V = len(log_p)
    total = log_p.new_zeros(())
    for i, code in enumerate(codes):
        for v in range(V):
            if v != i:
                total = total - (code * log_p[v]).sum(dim=1).mean()
    return total / (len(codes) * (V - 1))
