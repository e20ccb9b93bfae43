"""The sparse autoencoder's arithmetic in plain PyTorch and autograd: the definition of correct.

With x a row, already normalised (docs/objective.md derives the gradients that `cpu` computes by hand):

1. pre = W_enc (x - b_pre) + b_enc, one number per latent.
2. The k largest of pre stay; of these, negative ones become 0: the latent activations f.
3. x_hat = W_dec^T f + b_pre, and the loss is the mean of (x_hat - x)^2 over rows and elements.
4. Auxiliary loss: the k_aux largest positive pre among the *dead* latents reconstruct the residual x - x_hat,
   which is held constant, so the term teaches dead latents and nothing else (Gao et al. 2024, arXiv 2406.04093).
   It is weighted by min(1, dead / k_aux) and applies however few latents are dead.
5. The part of a decoder row's gradient along that row is removed, Adam steps, and rows return to unit norm
   (Bricken et al. 2023, "Towards Monosemanticity").
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from monosemy.kernels.types import Moments, Parameters, StepResult, StepSettings, TopK


def encode_topk(
    x: Float[Tensor, "row d_model"],
    W_enc: Float[Tensor, "latent d_model"],
    b_enc: Float[Tensor, " latent"],
    b_pre: Float[Tensor, " d_model"],
    k: int,
    dtype: torch.dtype = torch.float32,
) -> TopK:
    """The k largest latent activations of every row, negative ones as 0.

    `dtype` is the precision of the product that *selects* the latents; the values are always float32.
    """
    selecting = ((x - b_pre).to(dtype) @ W_enc.to(dtype).T).float() + b_enc
    indices = selecting.topk(k, dim=1, sorted=False).indices
    values = torch.einsum("rd,rkd->rk", x - b_pre, W_enc[indices]) + b_enc[indices]
    used = values > 0
    return TopK(torch.where(used, values, 0.0), torch.where(used, indices, 0).int())


def decode(
    code: TopK, W_dec: Float[Tensor, "latent d_model"], b_pre: Float[Tensor, " d_model"]
) -> Float[Tensor, "row d_model"]:
    """The reconstruction: active decoder directions, weighted by their values, plus `b_pre`."""
    return torch.einsum("rk,rkd->rd", code.values, W_dec[code.indices.long()]) + b_pre


def objective(
    parameters: Parameters, x: Float[Tensor, "row d_model"], dead: Bool[Tensor, " latent"], settings: StepSettings
) -> tuple[Tensor, Tensor, TopK, Tensor]:
    """(reconstruction loss, auxiliary loss, code, reconstruction), differentiable in `parameters`."""
    W_enc, b_enc, W_dec, b_pre = parameters
    pre = (x - b_pre) @ W_enc.T + b_enc
    values, indices = pre.topk(settings.k, dim=1)
    code = TopK(values.relu(), indices.int())
    reconstruction = decode(code, W_dec, b_pre)
    loss = (reconstruction - x).square().mean()

    n_dead = int(dead.sum())
    if n_dead == 0 or settings.k_aux == 0:
        return loss, torch.zeros(()), code, reconstruction
    residual = (x - reconstruction).detach()
    dead_values, places = pre[:, dead].topk(min(settings.k_aux, n_dead), dim=1)
    guess = torch.einsum("rk,rkd->rd", dead_values.relu(), W_dec[dead][places])
    return loss, (guess - residual).square().mean(), code, reconstruction


def train_step(
    parameters: Parameters,
    moments: Moments,
    x: Float[Tensor, "row d_model"],
    dead: Bool[Tensor, " latent"],
    settings: StepSettings,
    learning_rate: float,
    step: int,
) -> StepResult:
    """One training step on the batch `x`; `parameters` and `moments` change in place. `step` counts from 1."""
    leaves = Parameters(*(tensor.detach().requires_grad_() for tensor in parameters))
    loss, aux_loss, code, reconstruction = objective(leaves, x, dead, settings)
    (loss + settings.aux_weight * aux_scale(dead, settings) * aux_loss).backward()

    direction_gradient = leaves.W_dec.grad
    assert direction_gradient is not None
    along = (direction_gradient * parameters.W_dec).sum(dim=1, keepdim=True)
    direction_gradient -= along * parameters.W_dec

    optimizer = torch.optim.Adam(
        leaves, lr=learning_rate, betas=(settings.beta1, settings.beta2), eps=settings.epsilon, foreach=False
    )
    for leaf, first, second in zip(leaves, moments.first, moments.second, strict=True):
        optimizer.state[leaf] = {"step": torch.tensor(float(step - 1)), "exp_avg": first, "exp_avg_sq": second}
    optimizer.step()
    parameters.W_dec.div_(parameters.W_dec.norm(dim=1, keepdim=True))

    return StepResult(
        loss=loss.item(),
        fvu=((reconstruction - x).square().sum() / (x - x.mean(dim=0)).square().sum()).item(),
        aux_loss=aux_loss.item(),
        fired=fired_latents(code, len(parameters.b_enc)),
        l0=(code.values > 0).sum(dim=1).float().mean().item(),
    )


def aux_scale(dead: Bool[Tensor, " latent"], settings: StepSettings) -> float:
    """How much of the auxiliary loss counts: all of it once k_aux latents are dead."""
    return min(1.0, int(dead.sum()) / max(settings.k_aux, 1))


def fired_latents(code: TopK, n_latents: int) -> Bool[Tensor, " latent"]:
    """Which latents are active on any row of `code`."""
    fired = torch.zeros(n_latents, dtype=torch.bool)
    fired[code.indices[code.values > 0].long()] = True
    return fired
