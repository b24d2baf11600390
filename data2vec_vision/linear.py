"""The linear probe: logistic regression on standardised features, solved to the optimum in bounded memory.

N features [N, D] with labels [N] of C classes. They stay where they are, also in a memory-mapped file; a pass over
them takes them to the device chunk by chunk. The few numbers that are searched for stay on the CPU, in float64.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from data2vec_vision.probes import accuracy, chunks, mean_of, nothing
from data2vec_vision.split import stratified_split

KEPT_BYTES = 10**9  # of standardised features that are kept in memory, where there are no more
STRONGEST, WEAKEST, PATIENCE = 1, -9, 3  # powers of ten of the regularisation; how many are tried beyond the best
SURELY_WEAK = -2  # power of ten: before, nothing need be better for features that hardly vary in most directions
HELD_OUT = 0.2  # share of the training part by which the regularisation is chosen
UNCHOSEN = 0.01  # the regularisation where nothing can be held out
MAX_PASSES = 1000


@dataclass(frozen=True)
class LinearClassifier:
    """The class of features [*, D] is classes[argmax((features - mean) * scale @ weight + bias)]."""

    classes: Tensor  # int64 [C]: the labels that there were to learn
    mean: Tensor  # float64 [D]
    scale: Tensor  # float64 [D], 0 for a feature that does not vary
    weight: Tensor  # float64 [D, C]
    bias: Tensor  # float64 [C]
    strength: float  # of the regularisation

    def predict(
        self, features: Tensor, device: torch.device | None = None, tick: Callable[[], None] = nothing
    ) -> Tensor:
        """Features [Q, D] -> labels [Q], on the device of `classes`."""
        rows = StandardRows(features, self.mean, self.scale, device, torch.float32, columns=len(self.classes))
        return self.predict_rows(rows, tick)

    def predict_rows(self, rows: "StandardRows", tick: Callable[[], None] = nothing) -> Tensor:
        predicted = []
        for x, _ in rows:
            logits = x @ self.weight.to(x) + self.bias.to(x)
            predicted.append(self.classes[logits.argmax(dim=1).to(self.classes.device)])
            tick()
        return torch.cat(predicted)


def linear_probe(
    features: Tensor,
    labels: Tensor,
    seed: int,
    device: torch.device | None = None,
    tick: Callable[[], None] = nothing,
) -> tuple[LinearClassifier, dict[float, float]]:
    """Logistic regression whose regularisation is chosen by accuracy on a held-out stratified fifth.

    Returns the classifier of all features, and the held-out accuracy in per cent by strength, from strong to weak:
    powers of ten from 10 on, until 3 from 0.01 on are no better than the best. Of equals the stronger is taken. The
    dictionary is empty, and the strength 0.01, where no class has two images, of which one could be held out.
    """
    rest, held = (torch.from_numpy(part) for part in stratified_split(labels.numpy(), HELD_OUT, seed))
    tried: dict[float, float] = {}
    best = model = None
    if len(held):
        used = torch.zeros(len(labels)).index_fill_(0, rest, 1.0)
        regression = LogisticRegression(features, labels, used, device, torch.float32, tick)
        worse = 0
        for power in range(STRONGEST, WEAKEST - 1, -1):
            model = regression.solve(10.0**power, model)
            tried[model.strength] = accuracy(model.predict_rows(regression.rows, tick)[held], labels[held])
            if best is None or tried[model.strength] > tried[best.strength]:
                best, worse = model, 0
            elif power <= SURELY_WEAK:
                worse += 1
            if worse == PATIENCE:
                break
        del regression  # its standardised features, before others are made
    final = LogisticRegression(features, labels, None, device, torch.float64, tick)
    return final.solve(best.strength if best else UNCHOSEN, best), tried


class StandardRows:
    """Standardised features and their places, chunk by chunk, on `device`; kept there where they are few."""

    def __init__(
        self,
        features: Tensor,
        mean: Tensor,
        scale: Tensor,
        device: torch.device | None,
        dtype: torch.dtype,
        keep: bool = False,
        columns: int = 1,  # of what is computed of a row
    ):
        self.columns = columns
        self.features, self.device, self.dtype = features, device or features.device, dtype
        self.mean, self.scale = mean.to(self.device, dtype), scale.to(self.device, dtype)
        self._keep = keep and features.numel() * dtype.itemsize <= room(self.device)
        self._kept: dict[int, Tensor] = {}

    def __iter__(self) -> Iterator[tuple[Tensor, slice]]:
        for part in chunks(self.features, self.columns):
            x = self._kept.get(part.start)
            if x is None:
                x = (self.features[part].to(self.device, self.dtype) - self.mean) * self.scale
                if self._keep:
                    self._kept[part.start] = x
            yield x, part


def room(device: torch.device) -> int:
    """Bytes of features that may be kept on `device`."""
    return torch.cuda.mem_get_info(device)[0] // 3 if device.type == "cuda" else KEPT_BYTES


class LogisticRegression:
    """Multinomial: mean cross-entropy + strength / 2 * |weight|^2, with a free bias.

    In scikit-learn's words the strength is 1 / (C N); of two classes it fits one vector, the difference of ours, which
    is the same with 2 / (C N). `used` [N] are weights of the images: 0 leaves one out of
    everything. `dtype` is that of a pass over the features; devices without float64 take float32.
    """

    @torch.no_grad()
    def __init__(
        self,
        features: Tensor,
        labels: Tensor,
        used: Tensor | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float64,
        tick: Callable[[], None] = nothing,
    ):
        device = device or features.device
        dtype = torch.float32 if device.type == "mps" else dtype
        self.classes, self.target = labels.unique(return_inverse=True)
        self.used = torch.ones(len(labels)) if used is None else used
        self.count, self.tick = float(self.used.sum()), tick
        # Of the largest slope, and of a change of the loss: what the rounding of `dtype` allows.
        self.tolerances = (1e-6, 1e-12) if dtype == torch.float64 else (1e-4, 1e-8)
        mean, scale = standardisation(features, self.used)
        self.mean, self.scale = mean, scale
        self.rows = StandardRows(features, mean, scale, device, dtype, keep=True, columns=len(self.classes))
        self.covariance = torch.eye(features.shape[1] + 1, dtype=torch.float64)  # with that of the bias's 1
        self.covariance[:-1, :-1] = 0
        for x, part in self.rows:
            w = self.used[part].to(x).unsqueeze(1)
            self.covariance[:-1, :-1] += (x.T @ (x * w)).cpu() / self.count
            tick()

    @torch.no_grad()
    def solve(self, strength: float, start: LinearClassifier | None = None) -> LinearClassifier:
        """The optimum, searched for from `start`.

        L-BFGS in coordinates in which the curvature is about the same in all directions: the Hessian is about
        h * covariance + strength, with h the mean of p (1 - p), so that dozens of passes do instead of thousands.
        """
        penalty = torch.full((len(self.covariance), 1), strength, dtype=torch.float64)
        penalty[-1] = 0
        solution = torch.zeros(len(self.covariance), len(self.classes), dtype=torch.float64)
        if start is not None:
            solution[:-1], solution[-1] = start.weight, start.bias
        _, _, h = self.loss_slope_and_curvature(solution, penalty)
        root = root_of(h * self.covariance + torch.diag(penalty.squeeze(1)))

        def there(solution: Tensor) -> Tensor:
            return root.T @ solution

        def back(position: Tensor) -> Tensor:
            return torch.linalg.solve_triangular(root.T, position, upper=True)

        position = there(solution).contiguous().requires_grad_()
        optimizer = torch.optim.LBFGS(
            [position], 1, MAX_PASSES, MAX_PASSES, *self.tolerances, 10, line_search_fn="strong_wolfe"
        )

        @torch.no_grad()  # LBFGS switches gradients on
        def closure() -> Tensor:
            loss, slope, _ = self.loss_slope_and_curvature(back(position), penalty)
            position.grad = torch.linalg.solve_triangular(root, slope, upper=False).contiguous()
            return loss

        optimizer.step(closure)
        solution = back(position.detach())
        return LinearClassifier(self.classes, self.mean, self.scale, solution[:-1], solution[-1], strength)

    def loss_slope_and_curvature(self, solution: Tensor, penalty: Tensor) -> tuple[Tensor, Tensor, float]:
        """The objective, its gradient, and the mean of p (1 - p), at `solution` [D + 1, C], the bias last."""
        loss, curvature = torch.zeros((), dtype=torch.float64), 0.0
        slope = torch.zeros_like(solution)
        for x, part in self.rows:
            y, w = self.target[part].to(x.device).unsqueeze(1), self.used[part].to(x).unsqueeze(1)
            log_p = torch.log_softmax(x @ solution[:-1].to(x) + solution[-1].to(x), dim=1)
            loss -= (log_p.gather(1, y) * w).cpu().double().sum()
            error = log_p.exp_()
            curvature += float((w * error * (1 - error)).sum())
            error.scatter_add_(1, y, torch.full_like(w, -1)).mul_(w)
            slope[:-1] += (error.T @ x).T.cpu()  # x.T @ error is the same, ten times slower on a CPU
            slope[-1] += error.sum(dim=0).cpu()
            self.tick()
        loss = loss / self.count + (penalty / 2 * solution.square()).sum()
        slope = slope / self.count + penalty * solution
        return loss, slope, max(curvature / self.count / solution.shape[1], 1e-6)


def root_of(curvature: Tensor) -> Tensor:
    """The Cholesky factor of a matrix that rounding may have made a little indefinite, as of dependent features.

    It only changes the coordinates of the search, so that what is added to the diagonal moves no optimum.
    """
    jitter = 1e-9
    while True:
        root, failed = torch.linalg.cholesky_ex(curvature + jitter * torch.eye(len(curvature), dtype=curvature.dtype))
        if not failed:
            return root
        jitter *= 10


def standardisation(features: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean and 1 / standard deviation of features [N, D], both [D], 0 for a feature that does not vary.

    Weighted by `weights` [N] where given; float64, on the CPU.
    """
    weights = torch.ones(len(features), device=features.device) if weights is None else weights
    mean = mean_of(features, weights)
    square = torch.zeros_like(mean)
    for part in chunks(features):
        square += weights[part].double().cpu() @ (features[part].double().cpu() - mean).square()
    deviation = (square / float(weights.double().sum())).sqrt()
    varies = deviation > 1e-7 * mean.abs()  # what fp32 can tell
    return mean, torch.where(varies, 1 / deviation, 0.0)
