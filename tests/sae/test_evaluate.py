"""The stage `evaluate`, on a real model: what replaces rows, which text is measured, what is written and shown."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from known_saes import identity_sae

from monosemy.activations.capture import length_batches
from monosemy.artifact import read_manifest
from monosemy.corpus import open_tokens
from monosemy.llm.llama import Llama
from monosemy.runtime import InputError
from monosemy.sae import evaluate
from monosemy.sae.autoencoder import open_sae
from monosemy.sae.evaluate import EvaluateConfig, PatchedModel, contexts
from monosemy.sae.metrics import BehaviourSums
from monosemy.sae.texts import chat_messages


@pytest.fixture
def config(tiny_run: Path, tiny_llama_folder: Path, tmp_path: Path) -> EvaluateConfig:
    return EvaluateConfig(
        sae=tiny_run / "sae", tokens=tiny_run / "tokens", out=tmp_path / "metrics", model=str(tiny_llama_folder),
        dtype="float32", loss_tokens=300,
    )  # fmt: skip


def test_what_the_model_predicts_with_other_rows(tiny_run: Path, tiny_llama: Llama):
    """A perfect SAE changes nothing, zeros and means do; the original is the model's own loss; KL by its definition."""
    tokens, mean = open_tokens(tiny_run / "tokens"), torch.linspace(-1, 1, 32)
    sums, total, divergence, n = BehaviourSums(), 0.0, 0.0, 0
    patched = PatchedModel(identity_sae(32), tiny_llama)
    with torch.inference_mode():
        for batch in length_batches(tokens, range(40), 300):
            _, _, runs = patched.run(batch, mean)
            sums.add(runs.losses, runs.divergences, torch.zeros(int(runs.predicts.sum())).long())
            for ids in batch.ids.split(batch.lengths.tolist(), dim=1):
                logits = tiny_llama(ids)[0, :-1]
                total += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
                n += ids.shape[1] - 1
                zero = tiny_llama.unembed(torch.zeros(1, ids.shape[1] - 1, 32))[0]  # L1 is the last layer
                divergence += torch.nn.functional.kl_div(
                    zero.log_softmax(-1), logits.log_softmax(-1), reduction="sum", log_target=True
                ).item()
    result = sums.result()
    assert result.tokens == n
    assert result.original == pytest.approx(total / n, rel=1e-5)
    assert result.reconstructed == pytest.approx(result.original, rel=1e-4)
    assert result.loss_recovered == pytest.approx(1, abs=1e-3)
    assert result.kl == pytest.approx(0, abs=1e-5)
    assert result.kl_zero_ablated == pytest.approx(divergence / n, rel=1e-4)
    assert abs(result.zero_ablated - result.original) > 0.1
    assert abs(result.mean_ablated - result.zero_ablated) > 0.01


def test_the_stage(config: EvaluateConfig, capsys: pytest.CaptureFixture[str]):
    config = replace(config, context_lengths=(16, 64), chat=True)
    evaluate.run_and_print(config)
    metrics, held_out = evaluate.load_metrics(config.out), open_tokens(config.tokens)
    assert metrics.with_sinks.rows == int(held_out.lengths[held_out.validation].sum())
    assert 0 < metrics.without_sinks.fvu < 1
    assert metrics.without_sinks.l0 <= 4
    low, high = metrics.without_sinks.intervals["fvu"]
    assert low <= metrics.without_sinks.fvu <= high
    assert sum(of.rows for of in metrics.by_position) == metrics.without_sinks.rows
    assert [of.name for of in metrics.beyond] == ["context of 16", "context of 64", "chat"]
    assert all(of.reconstruction.rows > 0 for of in metrics.beyond)
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("loss recovered", "by position in the sentence", "context of 64", "chat"))
    assert json.loads((config.out / "metrics.json").read_text())["with_sinks"]["rows"] == metrics.with_sinks.rows
    assert read_manifest(config.out, "metrics").parents["sae"] == read_manifest(config.sae, "sae").digest


def test_contexts_are_documents_in_pieces(tiny_run: Path):
    tokens = open_tokens(tiny_run / "tokens")
    cut = contexts(tokens, 50, "validation", seed=0)
    assert set(cut.lengths.tolist()) == {50}
    for document in set(cut.document.tolist()):
        whole = [tokens.sentence(i) for i in (tokens.document == document).nonzero().squeeze(1).tolist()]
        text, pieces = torch.cat(whole), {tuple(cut.sentence(i).tolist()) for i in range(cut.n_sentences)}
        assert len(text) // 50 == int((cut.document == document).sum())
        assert all(tuple(text[i : i + 50].tolist()) in pieces for i in range(0, len(text) - 49, 50))
    held_out = set(tokens.document[tokens.validation].tolist())
    assert set(cut.document.tolist()) == held_out
    assert len(set(contexts(tokens, 50, "all", seed=0).document.tolist())) > len(held_out)


def test_chat_messages_are_in_the_models_template(tiny_run: Path, tiny_llama: Llama):
    tokens = open_tokens(tiny_run / "tokens")
    messages = chat_messages(tokens, tiny_llama, torch.arange(3).numpy())
    text = tiny_llama.tokenizer.decode(messages.sentence(1).tolist())
    sentence = tiny_llama.tokenizer.decode(tokens.sentence(1).tolist()).strip()
    assert text == tiny_llama.tokenizer.chat([{"role": "user", "content": sentence}])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0; expected at least 1"),
        ({"context_lengths": (1,)}, r"context_lengths are \(1,\); expected at least 2 tokens each"),
        ({"context_lengths": (513,)}, "context_lengths holds 513; .* reads at most 512 tokens"),
        ({"context_lengths": (512,), "max_tokens": 100, "tokens": "short"}, "but the longest document has"),
        (
            {"tokens": "short"},
            "no validation documents: tokenize with .*, or give --split all",
        ),
    ],
)
def test_bad_evaluations(config: EvaluateConfig, tmp_path: Path, changes: dict, message: str):
    from monosemy import corpus

    if "tokens" in changes:
        (tmp_path / "short.txt").write_text("We must act now. They spoke of peace.")
        places = {"text": (str(tmp_path / "short.txt"),), "out": tmp_path / "short"}
        corpus.run(corpus.TokenizeConfig(model=config.model, **places, validation_fraction=0.0))
        changes = changes | {"tokens": tmp_path / "short"}
        changes |= {"split": "all"} if "context_lengths" in changes else {}
    with pytest.raises(InputError, match=message):
        evaluate.run(replace(config, **changes))
    assert not config.out.exists()


def test_an_sae_of_another_model_is_refused(tiny_run: Path, smollm2: Llama):
    with pytest.raises(InputError, match=r"trained on width 32 .* but .* has width 576"):
        evaluate.check_fits(open_sae(tiny_run / "sae"), smollm2)
