"""Times two ways of doing the same work in turn, so that a busy machine slows both alike; and keeps the result."""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from machine import describe

RESULTS = Path(__file__).parent / "results"


class Pair(NamedTuple):
    """Medians over the rounds; `ratio` is that of the pairs' own ratios."""

    ours: float
    theirs: float
    ratio: float


def rate(work: Callable[[], int]) -> float:
    """Items per second of one call; `work` returns how many items it did."""
    start = time.perf_counter()
    return work() / (time.perf_counter() - start)


def measure_pair(ours: Callable[[], int], theirs: Callable[[], int], rounds: int) -> Pair:
    """Rates of both, items per second, after one call of each that does not count."""
    ours(), theirs()
    rates = [(rate(ours), rate(theirs)) for _ in range(rounds)]
    mine, other = zip(*rates, strict=True)
    return Pair(statistics.median(mine), statistics.median(other), statistics.median(a / b for a, b in rates))


def keep(name: str, result: dict[str, Any], table: list[tuple[str, ...]]) -> None:
    """Print `table`, and write `result` with machine, versions and commit to results/NAME.json."""
    from rich.console import Console
    from rich.table import Table

    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps({"benchmark": name, **describe(), **result}, indent=1) + "\n")
    header, *rows = table
    shown = Table(*header)
    for row in rows:
        shown.add_row(*row)
    Console().print(shown)


def transformers_smollm2(dtype: Any) -> Any:
    """SmolLM2 as `transformers` runs it from a checkpoint of that dtype: the same values, dequantised."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from monosemy.llm.checkpoint import load_model

    ours = load_model("smollm2", dtype=dtype)
    shape = ours.config
    config = LlamaConfig(
        hidden_size=shape.d_model, num_hidden_layers=shape.n_layers, num_attention_heads=shape.n_heads,
        num_key_value_heads=shape.n_kv_heads, head_dim=shape.head_dim, intermediate_size=shape.d_mlp,
        vocab_size=shape.vocabulary, max_position_embeddings=shape.context_length, rms_norm_eps=shape.norm_epsilon,
        rope_theta=shape.rope_theta, rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype).eval()
    state = ours.named_weights()
    model.load_state_dict(state | {"lm_head.weight": state["model.embed_tokens.weight"]})
    return model
