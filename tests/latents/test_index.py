"""An index says what the SAE does on the text, whether activations come from disk or from the model."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from monosemy import corpus
from monosemy.activations import capture, store
from monosemy.latents import index
from monosemy.latents.index import IndexConfig, open_index
from monosemy.latents.logit_effect import logit_effects
from monosemy.llm.llama import Llama, RMSNorm
from monosemy.llm.sites import Site
from monosemy.runtime import InputError
from monosemy.sae.autoencoder import open_sae


@pytest.fixture(scope="module")
def config(tiny_run: Path, tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> IndexConfig:
    return IndexConfig(
        sae=tiny_run / "sae",
        tokens=tiny_run / "tokens",
        activations=tiny_run / "activations",
        out=tmp_path_factory.mktemp("index") / "index",
        model=str(tiny_llama_folder),
        dtype="float32",
        n_examples=6,
        n_tokens=5,
        background=20,
    )


@pytest.fixture(scope="module")
def opened(config: IndexConfig) -> index.Index:
    index.run(config)
    return open_index(config.out, verify=True)


@pytest.fixture(scope="module")
def dense(config: IndexConfig) -> dict[int, np.ndarray]:
    """Per sentence the activations (token, latent)."""
    assert config.activations is not None
    sae, stored = open_sae(config.sae), store.open_activations(config.activations)
    sentences = {}
    for shard in range(stored.n_shards):
        table, rows = stored.table(shard), stored.shard(Site.parse(sae.config.site), shard).rows
        code = sae.encode(rows)
        matrix = torch.zeros(len(rows), sae.config.n_latents).scatter_(1, code.indices.long(), code.values)
        matrix[sae.is_sink(rows)] = 0
        for sentence in table.sentence.unique().tolist():
            sentences[sentence] = matrix[table.sentence == sentence].numpy()
    return sentences


@pytest.mark.parametrize("aggregation", ["max", "mean", "last"])
def test_examples_are_the_best_sentences(opened, dense, config, aggregation):
    tokens = corpus.open_tokens(config.tokens)
    score = {"max": lambda a: a.max(0), "mean": lambda a: a.mean(0), "last": lambda a: a[-1]}[aggregation]
    scores = {sentence: score(matrix) for sentence, matrix in dense.items()}
    for latent in range(opened.n_latents):
        best = sorted((-values[latent], sentence) for sentence, values in scores.items() if values[latent] > 0)[:6]
        examples = opened.examples(latent, aggregation)
        np.testing.assert_allclose([example.score for example in examples], [-value for value, _ in best], rtol=1e-5)
        for example in examples:
            assert example.ids.tolist() == tokens.sentence(example.sentence).tolist()
            assert example.document == tokens.document[example.sentence]
            np.testing.assert_allclose(example.activations, dense[example.sentence][:, latent], rtol=1e-5, atol=1e-6)


def test_statistics_are_those_of_the_dense_matrix(opened, dense):
    every = np.concatenate(list(dense.values()))
    rows = opened.manifest.rows
    np.testing.assert_array_equal(opened.statistics.n_fired, (every > 0).sum(0))
    np.testing.assert_allclose(opened.statistics.density, (every > 0).sum(0) / (rows["tokens"] - rows["sinks"]))
    np.testing.assert_allclose(opened.statistics.max, every.max(0), rtol=1e-6)
    record = opened.latent(3)
    fired = every[:, 3][every[:, 3] > 0]
    assert record.n_fired == len(fired) == record.histogram.sum()
    assert record.mean == pytest.approx(fired.mean() if len(fired) else 0.0, rel=1e-5)


def test_activations_from_the_model_give_the_same_index(opened, config, tmp_path):
    index.run(replace(config, activations=None, out=tmp_path / "index", batch_tokens=200))
    again = open_index(tmp_path / "index")
    np.testing.assert_array_equal(again.statistics.n_fired, opened.statistics.n_fired)
    for latent in range(0, opened.n_latents, 7):
        for one, other in zip(again.examples(latent), opened.examples(latent), strict=True):
            assert one.score == pytest.approx(other.score, rel=1e-3)


def test_pieces_join_to_the_sentence_without_the_model(opened, tiny_llama: Llama):
    for example in opened.examples(int(opened.statistics.n_fired.argmax())):
        assert "".join(example.pieces) == tiny_llama.tokenizer.decode(example.ids.tolist())


def test_characters_split_over_tokens_are_whole_again(opened, tiny_llama: Llama):
    ids = tiny_llama.tokenizer.encode("naïve 🙂 done")
    assert opened.pieces(ids) == tiny_llama.tokenizer.pieces(ids)


def test_background_is_a_random_sample_and_tokens_are_counted(opened, config):
    tokens = corpus.open_tokens(config.tokens)
    assert int(opened.sentences.background.sum()) == 20
    assert opened.token_counts.sum() == tokens.n_tokens
    place = int(opened.sentences.background.argmax())
    ids = opened.sentences.ids[opened.sentences.starts[place] : opened.sentences.starts[place + 1]]
    assert ids.tolist() == tokens.sentence(int(opened.sentences.number[place])).tolist()


def test_example_table_holds_all_latents_examples(opened):
    table = opened.example_table("mean")
    for latent in (0, 5, 63):
        rows = np.flatnonzero(table.latent == latent)
        examples = opened.examples(latent, "mean")
        assert table.sentence[rows].tolist() == [example.sentence for example in examples]
        for row, example in zip(rows, examples, strict=True):
            entries = slice(table.starts[row], table.starts[row + 1])
            np.testing.assert_array_equal(example.activations[table.positions[entries]], table.activations[entries])


@pytest.mark.parametrize("centered", [False, True], ids=["RMSNorm", "LayerNorm"])
def test_logit_effects_are_those_of_the_dense_product(centered: bool):
    generator = torch.Generator().manual_seed(0)
    directions, unembedding = torch.randn(300, 8, generator=generator), torch.randn(50, 8, generator=generator)
    norm = torch.nn.LayerNorm(8) if centered else RMSNorm(8, 1e-5)
    norm.weight.data = torch.rand(8, generator=generator)
    if centered:
        norm.bias.data = torch.rand(8, generator=generator)
    effects = logit_effects(directions, norm, unembedding, 4)
    through = directions - directions.mean(dim=1, keepdim=True) if centered else directions
    logits = (through * norm.weight.detach()) @ unembedding.T
    standard = (logits - logits.mean(0)) / logits.std(0, correction=0)
    for values, tokens, sign in (
        (effects.promoted_by, effects.promoted, 1),
        (effects.suppressed_by, effects.suppressed, -1),
    ):
        expected = (sign * standard).topk(4)
        np.testing.assert_allclose(sign * values, expected.values, rtol=1e-3, atol=1e-4)
        np.testing.assert_array_equal(tokens, expected.indices)


def test_logits_of_one_latent(opened):
    logits = opened.logits(2)
    assert [effect.token for effect in logits.promoted] == opened.promoted()[2].tolist()
    values = [effect.value for effect in logits.promoted]
    assert values == sorted(values, reverse=True)
    assert logits.suppressed[0].value < 0 < logits.promoted[0].value


def test_a_second_run_finds_the_index_complete(opened, config):
    assert index.run(config).digest == opened.manifest.digest
    with pytest.raises(InputError, match="made with other settings"):
        index.run(replace(config, n_examples=7))


def test_the_same_command_gives_the_same_bytes(opened, config, tmp_path):
    again = index.run(replace(config, out=tmp_path / "index"))
    assert again.files == opened.manifest.files


def test_a_latent_that_does_not_exist(opened):
    with pytest.raises(InputError, match="latent 64 does not exist: .* has latents 0 to 63"):
        opened.examples(64)


def test_activations_of_other_tokens(config, tiny_run, tiny_llama_folder, tmp_path):
    texts = tuple(str(path) for path in sorted(tiny_run.glob("*.txt"))[:2])
    corpus.run(corpus.TokenizeConfig(model=str(tiny_llama_folder), text=texts, out=tmp_path / "tokens"))
    with pytest.raises(InputError, match="was captured from other tokens"):
        index.run(replace(config, tokens=tmp_path / "tokens", out=tmp_path / "index"))
    assert not list(tmp_path.glob("index*"))


def test_activations_without_the_site_of_the_sae(config, tiny_run, tiny_llama_folder, tmp_path):
    capture.run(
        capture.CaptureConfig(
            tokens=tiny_run / "tokens", out=tmp_path / "activations", model=str(tiny_llama_folder), dtype="float32",
            sites=("L0.resid_mid",),
        )
    )  # fmt: skip
    with pytest.raises(InputError, match=r"holds no L1.resid_post; it holds L0.resid_mid"):
        index.run(replace(config, activations=tmp_path / "activations", out=tmp_path / "index"))


def test_bad_settings(config):
    with pytest.raises(InputError, match="n_examples is 0; expected at least 1"):
        replace(config, n_examples=0)


def test_a_damaged_index(opened, config, tmp_path):
    shutil.copytree(config.out, tmp_path / "index")
    (tmp_path / "index" / "logits.parquet").write_bytes(b"")
    with pytest.raises(InputError, match=r"is damaged: logits.parquet has 0 bytes"):
        open_index(tmp_path / "index")
