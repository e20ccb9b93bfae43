"""The sparse autoencoder's arithmetic in plain PyTorch and autograd: the definition of correct.

With x a row, already normalised, and y the row to reconstruct (x itself, or a transcoder's target); docs/objective.md
derives the gradients that `step` computes by hand:

1. pre = W_enc (x - b_pre) + b_enc, one number per latent.
2. Some stay, and of these negative ones become 0: the latent activations f. `topk`: the k largest of the row (Gao et
   al. 2024, arXiv 2406.04093). `batch_topk`: the k x rows largest positive ones of the batch (Bussmann et al. 2024,
   arXiv 2412.06410). `relu`: all. With a free decoder they are ranked by pre x |W_dec| (He et al. 2024, arXiv
   2410.20526).
3. y_hat = W_dec^T f + b (+ W_skip (x - b_pre)), and the loss is the mean of (y_hat - y)^2 over rows and elements. With
   `prefixes`, it is the mean of that over y_hat made of the first m latents alone, for every m (Bussmann et al. 2025,
   arXiv 2503.17547).
4. `relu` adds l1 x sum_i f_i |W_dec[i]|, per element.
5. Auxiliary loss: the k_aux largest positive pre among the *dead* latents reconstruct the residual y - y_hat, which is
   held constant, so the term teaches dead latents and nothing else (Gao et al. 2024). It is weighted by
   min(1, dead / k_aux) and applies however few latents are dead.
6. Unit decoder: the part of a decoder row's gradient along that row is removed, AdamW steps, and rows return to unit
   norm (Bricken et al. 2023, "Towards Monosemanticity"). Free decoder: AdamW steps.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from monosemy.kernels.types import Moments, Parameters, StepResult, StepSettings, TopK

ROWS_TIMES_LATENTS = 1 << 24
"""Dense activations that are held at once."""


def encode_topk(
    centred: Float[Tensor, "row d_in"],
    W_enc: Float[Tensor, "latent d_in"],
    b_enc: Float[Tensor, " latent"],
    k: int,
    norms: Float[Tensor, " latent"] | None = None,
) -> TopK:
    """The k largest latent activations of every row, negative ones as 0. `centred` is x - b_pre; with `norms`, latents
    are ranked by activation x norm. Of equal ones the lowest latents are taken."""
    pre = centred @ W_enc.T + b_enc
    ranked = pre if norms is None else pre * norms
    indices = ranked.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values
    values = pre.gather(1, indices)
    used = values > 0
    return TopK(torch.where(used, values, 0.0), torch.where(used, indices, 0).int())


def decode(
    code: TopK, W_dec: Float[Tensor, "latent d_out"], bias: Float[Tensor, " d_out"]
) -> Float[Tensor, "row d_out"]:
    """The reconstruction: active decoder directions, weighted by their values, plus `bias`."""
    return torch.einsum("rk,rkd->rd", code.values, W_dec[code.indices.long()]) + bias


def active_latents(
    pre: Float[Tensor, "row latent"], W_dec: Float[Tensor, "latent d_out"], settings: StepSettings
) -> Bool[Tensor, "row latent"]:
    """Step 2: which latents are active on which rows."""
    ranked = pre.detach() * W_dec.detach().norm(dim=1) if settings.decoder == "free" else pre.detach()
    match settings.activation:
        case "relu":
            return pre > 0
        case "batch_topk":
            n_kept = min(settings.k * len(pre), pre.numel())
            return (ranked > 0) & (ranked >= ranked.flatten().topk(n_kept).values[-1])
        case "topk":
            kept = ranked.topk(settings.k, dim=1).indices
            return torch.zeros_like(ranked, dtype=torch.bool).scatter_(1, kept, True) & (pre > 0)


def objective(
    parameters: Parameters,
    x: Float[Tensor, "row d_in"],
    target: Float[Tensor, "row d_out"],
    dead: Bool[Tensor, " latent"],
    settings: StepSettings,
) -> tuple[Tensor, Tensor, Tensor, Float[Tensor, "row latent"], Float[Tensor, "row d_out"]]:
    """(reconstruction loss, auxiliary loss, sparsity loss, activations, reconstruction), differentiable."""
    centred = x - parameters.b_pre
    pre = centred @ parameters.W_enc.T + parameters.b_enc
    active = active_latents(pre, parameters.W_dec, settings)
    activations = torch.where(active, pre, 0.0).relu()
    base = parameters.output_bias
    if parameters.W_skip is not None:
        base = base + centred @ parameters.W_skip.T
    prefixes = settings.prefixes or (len(parameters.b_enc),)
    guesses = [activations[:, :size] @ parameters.W_dec[:size] + base for size in prefixes]
    loss = torch.stack([(guess - target).square().mean() for guess in guesses]).mean()
    sparsity = settings.l1 * (activations @ parameters.W_dec.norm(dim=1)).mean() / target.shape[1]

    reconstruction, aux_loss = guesses[-1], torch.zeros((), device=x.device)
    n_dead = int(dead.sum())
    if n_dead and settings.k_aux:
        residual = (target - reconstruction).detach()
        dead_pre, dead_rows = pre[:, dead], parameters.W_dec[dead]
        ranked = dead_pre * dead_rows.detach().norm(dim=1) if settings.decoder == "free" else dead_pre
        places = ranked.topk(min(settings.k_aux, n_dead), dim=1).indices
        guess = torch.einsum("rk,rkd->rd", dead_pre.gather(1, places).relu(), dead_rows[places])
        aux_loss = (guess - residual).square().mean()
    return loss, aux_loss, sparsity, activations, reconstruction


def train_step(
    parameters: Parameters,
    moments: Moments,
    x: Float[Tensor, "row d_in"],
    dead: Bool[Tensor, " latent"],
    settings: StepSettings,
    learning_rate: float,
    step: int,
    target: Float[Tensor, "row d_out"] | None = None,
) -> StepResult:
    """One training step on the batch `x`; `parameters` and `moments` change in place. `step` counts from 1.

    Gradients are accumulated over parts of the batch, so that dense activations of a part are all that is held;
    `batch_topk`, which looks at all rows at once, takes the batch whole.
    """
    target = x if target is None else target
    leaves = parameters.map(lambda tensor: tensor.detach().requires_grad_())
    n_part = max(1, ROWS_TIMES_LATENTS // len(parameters.b_enc)) if settings.activation != "batch_topk" else len(x)
    loss = aux_loss = squared_error = 0.0
    counts = torch.zeros(len(parameters.b_enc), dtype=torch.int64, device=x.device)
    for part, wanted in zip(x.split(n_part), target.split(n_part), strict=True):
        share = len(part) / len(x)
        terms = objective(leaves, part, wanted, dead, settings)
        main, auxiliary, sparsity, activations, reconstruction = terms
        weight = settings.aux_weight * aux_scale(int(dead.sum()), settings)
        (share * (main + weight * auxiliary + sparsity)).backward()
        loss += share * main.item()
        aux_loss += share * auxiliary.item()
        squared_error += (reconstruction.detach() - wanted).double().square().sum().item()
        counts += (activations > 0).sum(dim=0)

    if settings.decoder == "unit":
        direction_gradient = leaves.W_dec.grad
        assert direction_gradient is not None
        direction_gradient -= (direction_gradient * parameters.W_dec).sum(dim=1, keepdim=True) * parameters.W_dec
    optimizer = torch.optim.AdamW(
        leaves.named().values(), lr=learning_rate, betas=(settings.beta1, settings.beta2), eps=settings.epsilon,
        weight_decay=settings.weight_decay, foreach=False,
    )  # fmt: skip
    for name, leaf in leaves.named().items():
        first, second = getattr(moments.first, name), getattr(moments.second, name)
        optimizer.state[leaf] = {"step": torch.tensor(float(step - 1)), "exp_avg": first, "exp_avg_sq": second}
    optimizer.step()
    if settings.decoder == "unit":
        parameters.W_dec.div_(parameters.W_dec.norm(dim=1, keepdim=True))

    fvu = fraction_unexplained(squared_error, target)
    return StepResult(loss, fvu, aux_loss, counts, counts.sum().item() / len(x))


def squared_error(
    parameters: Parameters, x: Float[Tensor, "row d_in"], target: Float[Tensor, "row d_out"], settings: StepSettings
) -> float:
    """The squared error of the reconstruction by all latents, summed over rows."""
    nobody = torch.zeros_like(parameters.b_enc, dtype=torch.bool)
    n_part = max(1, ROWS_TIMES_LATENTS // len(parameters.b_enc))
    total = 0.0
    for part, wanted in zip(x.split(n_part), target.split(n_part), strict=True):
        reconstruction = objective(parameters, part, wanted, nobody, settings)[-1]
        total += (reconstruction - wanted).double().square().sum().item()
    return total


def aux_scale(n_dead: int, settings: StepSettings) -> float:
    """How much of the auxiliary loss counts: all of it once k_aux latents are dead."""
    return min(1.0, n_dead / max(settings.k_aux, 1))


def fraction_unexplained(squared_error: float, target: Float[Tensor, "row d_out"]) -> float:
    """The squared error as a fraction of the batch's variance about its mean; NaN if it has none."""
    variance = torch.linalg.vector_norm(target - target.mean(dim=0)).item() ** 2
    return squared_error / variance if variance else float("nan")


def group_of_latents(
    n_latents: int, settings: StepSettings, device: torch.device, first: int = 0
) -> Int[Tensor, " latent"]:
    """For each of `n_latents` from `first`, the first of the nested dictionaries that has it."""
    group = torch.zeros(n_latents, dtype=torch.int32, device=device)
    for size in settings.prefixes[:-1]:
        group[max(0, size - first) :] += 1
    return group
