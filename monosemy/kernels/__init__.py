"""The sparse autoencoder's arithmetic: defined in `reference`, compiled in `cpu`, one signature for both."""

from monosemy.kernels.cpu import Workspace, decode, encode_topk, train_step
from monosemy.kernels.types import Moments, Parameters, StepResult, StepSettings, TopK

__all__ = [
    "Moments", "Parameters", "StepResult", "StepSettings", "TopK", "Workspace", "decode", "encode_topk", "train_step",
]  # fmt: skip
