"""What the training programs optimise with: Muon, an average of the weights, the learning rate's course."""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

SETTLED = 10**6  # updates after which an average's decay is the given one


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are made orthogonal before they are applied (K. Jordan, 2024).

    params: at least 2-D each; beyond that, flattened to (first, all others), as fits linear and convolution weights.
    The step has the size of an AdamW step, 0.2 root mean square times `lr`, so that both can share a learning rate.
    `torch.optim.Muon` is no substitute: torch 2.8 has none, and that of 2.9 and later takes 2-D parameters only (no
    convolutions), one at a time (there are hundreds of small ones), always in bfloat16.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            same_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    same_shape[p.shape].append(p)
            for params in same_shape.values():
                self._step(params, group["lr"], group["momentum"])

    def _step(self, params: list[Tensor], lr: float, momentum: float) -> None:
        """One step of parameters of one shape, in few kernels: there may be hundreds of small ones."""
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        grads = [p.grad for p in params if p.grad is not None]
        averages = [self.state[p]["momentum"] for p in params]
        torch._foreach_lerp_(averages, grads, 1 - momentum)
        ahead = torch._foreach_lerp(grads, averages, momentum)  # Nesterov
        matrices = orthogonalize(torch.stack(ahead).flatten(2))
        scale = 0.2 * max(matrices.shape[-2:]) ** 0.5
        torch._foreach_add_(params, list(matrices.view(-1, *params[0].shape)), alpha=-lr * scale)


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrices of (N, rows, columns), roughly: singular values come to lie around 1.

    Newton-Schulz iteration with coefficients that favour speed over exactness; in bfloat16 on a GPU.
    """
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)


class EMA:
    """An exponential moving average of a model's state dict, under the same names.

    It follows faster at first: after n updates the decay is at most (1 + n) / (10 + n).
    `swa_utils.AveragedModel` keeps a whole second module instead, names its tensors differently from the weight files
    and cannot start from a trained model's, so it would need more code around it than it replaces.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model, self.decay = model, decay
        self.begin()

    def begin(self) -> None:
        """Begins with the model's present weights, which are soon forgotten."""
        self.updates = 0
        self.average = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(list(self.average.values()), list(self.model.state_dict().values()), 1 - decay)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        model.load_state_dict(self.average)

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.average)

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Takes up a settled average."""
        for name, tensor in self.average.items():
            tensor.copy_(tensors[name])
        self.updates = SETTLED


def lr_at(progress: float, step: int, warmup: int = 100) -> float:
    """Share of the peak learning rate at a progress of 0 to 1: grows over `warmup` steps and falls linearly to 0."""
    return min(1.0, (step + 1) / warmup) * max(0.0, 1 - progress)


class GradientClipper:
    """Scales all gradients down to a norm of `most` together, and makes those of a bad step zero: it costs no run.

    Bad is what is not finite, or `spike` times as large as usual. What stays large for some steps becomes usual.
    """

    def __init__(self, most: float = 1.0, spike: float = 10.0):
        self.most, self.spike = most, spike
        # On the model's device, so that nothing waits for it.
        self._usual: Tensor | None = None
        self._lost: Tensor | None = None

    def __call__(self, parameters: Iterable[nn.Parameter]) -> None:
        parameters = list(parameters)
        norm = nn.utils.clip_grad_norm_(parameters, self.most)
        if self._usual is None or self._lost is None:
            self._usual, self._lost = torch.full_like(norm, torch.inf), torch.zeros_like(norm)
        good = norm.isfinite() & (norm <= self.spike * self._usual)
        known = self._usual.isfinite()
        self._usual = torch.where(
            good, torch.where(known, torch.lerp(self._usual, norm, 0.05), norm), self._usual * 1.1
        )
        self._lost += ~good
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.masked_fill_(~good, 0)

    @property
    def lost(self) -> int:
        """How many steps were made zero so far."""
        return 0 if self._lost is None else int(self._lost)
