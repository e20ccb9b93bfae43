"""Latents planted on known words get labels with those words; the clearer the firing, the surer the label."""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from monosemy import corpus, kernels
from monosemy.artifact import Draft
from monosemy.explain import explainer
from monosemy.explain.explainer import ExplainConfig, label_of
from monosemy.explain.hypotheses import Condition, Corpus, Firing, fit
from monosemy.explain.lexicon import CLASSES, WORD, Lexicon, _words_of
from monosemy.latents import index, query
from monosemy.latents.labels import open_labels
from monosemy.latents.query import FeaturesConfig
from monosemy.llm.llama import Llama
from monosemy.runtime import InputError
from monosemy.sae.autoencoder import SAE, SAEConfig

SUBJECTS = ("The farmers", "Our children", "Many workers", "The judges", "All teachers", "Young soldiers")
WISHES = ("peace", "gold", "trade", "better schools", "lower taxes", "the United Nations", "Social Security")
PLACES = ("in Ohio", "in Texas", "at home", "on the farm", "near the river")
PLANTED = (" peace", " Nations", " Security", " farmers")
MIXED = (" peace", " river", " taxes", " Ohio")
"""What the latent after those of `PLANTED` fires on; the one after it never fires."""


@dataclass(frozen=True)
class Planted:
    words: tuple[str, ...] = PLANTED


@pytest.fixture(scope="module")
def folder(tiny_llama: Llama, tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text, an SAE that reads words off the embedding, its index and its labels."""
    folder = tmp_path_factory.mktemp("planted")
    sentences = [
        f"{SUBJECTS[i % 6]} {PLACES[i % 5]} asked for {WISHES[i % 7]} in {1900 + i % 83}, "
        f"and it cost ${i % 90 + 10} million."
        for i in range(420)
    ]
    (folder / "speech.txt").write_text(" ".join(sentences))
    model = str(tiny_llama_folder)
    corpus.run(corpus.TokenizeConfig(model=model, text=(str(folder / "speech.txt"),), out=folder / "tokens"))
    with Draft(folder / "sae", "sae", Planted(), {}) as draft:
        planted_sae(tiny_llama).save(draft.path)
        draft.commit({})
    index.run(
        index.IndexConfig(
            sae=folder / "sae",
            tokens=folder / "tokens",
            out=folder / "index",
            model=model,
            dtype="float32",
            n_examples=420,
        )
    )
    explainer.run(ExplainConfig(index=folder / "index", out=folder / "labels"))
    return folder


def planted_sae(model: Llama) -> SAE:
    """Latent i fires where the token is `PLANTED[i]`, the next on any of `MIXED`, the last nowhere.

    None fires on the bare space before a number, which 32 dimensions would otherwise confuse with one of the words.
    """
    space = model.tokenizer.encode("in 1")[1]
    groups = [(word,) for word in PLANTED] + [MIXED]
    W_enc = torch.zeros(len(groups) + 1, model.config.d_model)
    for latent, words in enumerate(groups):
        ids = torch.tensor([*(model.tokenizer.encode(word) for word in words), [space]])  # (word, 1): one token each
        wanted = torch.tensor([1.0] * len(words) + [0.0])
        rows = model.embed(ids)[:, 0]
        rows = rows - rows.mean(dim=1, keepdim=True)
        W_enc[latent] = torch.linalg.pinv(rows / rows.std(dim=1, correction=0, keepdim=True)) @ wanted
    b_enc = torch.full((len(W_enc),), -0.85)
    parameters = kernels.Parameters(W_enc, b_enc, W_enc.clone(), torch.zeros(model.config.d_model))
    return SAE(SAEConfig(model.config.d_model, len(W_enc), 2, "L0.resid_pre", model.name), parameters)


@pytest.fixture(scope="module")
def labels(folder: Path):
    return open_labels(folder / "labels", verify=True)


@pytest.fixture(scope="module")
def counted(folder: Path) -> Corpus:
    lexicon = Lexicon(index.open_index(folder / "index"))
    return Corpus(lexicon, float(lexicon.n_background))


@pytest.mark.parametrize(
    ("latent", "expected"),
    [(0, "the word ‘peace’"), (1, "United Nations"), (2, "Social Security"), (3, "farmers")],
)
def test_a_planted_latent_is_found(labels, latent, expected):
    assert expected in labels[latent].label
    assert labels[latent].certainty > 0.6
    assert labels[latent].evidence["coverage"] > 0.9
    assert labels[latent].evidence["words"][0]["share"] > 0.9


def test_a_latent_of_many_words_names_them(labels):
    assert [word for word in ("peace", "river", "taxes", "Ohio") if word not in labels[4].label] == []
    assert labels[4].evidence["coverage"] > 0.7


def test_a_latent_that_never_fires_has_no_label(labels):
    assert labels[5].label == ""
    assert labels[5].certainty == 0


def firing_on(counted: Corpus, words: np.ndarray) -> Firing:
    """A latent that fires on exactly these words, equally strongly."""
    pieces = np.zeros(len(words), np.int64)
    share = len(words) / counted.n_words
    sentences = len(np.unique(counted.lexicon.sentence[words]))
    return Firing(words, pieces, np.full(len(words), 1 / len(words)), sentences, float(len(words)), share)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [("years", "years"), ("dollar amounts", "dollar amounts"), ("first words", "first words of a sentence")],
)
def test_classes_describe_what_no_word_does(counted, pattern, expected):
    lexicon = counted.lexicon
    if pattern in CLASSES:
        chosen = lexicon.classes[:, CLASSES.index(pattern)] & lexicon.background
    else:
        chosen = (lexicon.form[np.arange(len(lexicon.form)) - 1] == 0) & lexicon.background
    label = label_of(0, firing_on(counted, chosen.nonzero()[0]), counted, [], ExplainConfig(Path(), Path()))
    assert label.label == expected
    assert label.certainty > 0.9


def test_certainty_falls_with_noise(counted):
    lexicon = counted.lexicon
    (peace,) = (lexicon.form == lexicon.forms.index("peace")).nonzero()
    others = np.random.default_rng(0).permutation(lexicon.background.nonzero()[0])
    config = ExplainConfig(Path(), Path())
    noise = [np.union1d(peace, others[:n]) for n in (0, 40, 120, 1000)]
    certainties = [label_of(0, firing_on(counted, words), counted, [], config).certainty for words in noise]
    assert certainties == sorted(certainties, reverse=True)
    assert certainties[0] > 0.9 > 0.35 > certainties[-1]


def test_fit_by_hand(counted):
    firing = Firing(np.arange(4), np.zeros(4, np.int64), np.array([0.4, 0.3, 0.2, 0.1]), 2, 8.0, 0.01)
    found = fit(firing, np.array([True, True, False, False]), 40.0)
    assert found.coverage == pytest.approx(0.7)
    assert found.precision == pytest.approx(4 / 40)
    assert found.specificity == pytest.approx(0.5)  # log(0.1 / 0.01) / log(1 / 0.01)
    assert found.certainty == pytest.approx(0.7 * 0.5 * 2 / 4)
    assert found.lift == pytest.approx(10)


def test_counts_are_those_of_a_plain_search(counted):
    lexicon = counted.lexicon
    united, nations = lexicon.forms.index("united"), lexicon.forms.index("nations")
    places = lexicon.background.nonzero()[0]
    pairs = sum(lexicon.form[place] == nations and lexicon.form[place - 1] == united for place in places)
    assert counted.count((Condition("form", 0, nations), Condition("form", -1, united))) == pairs > 0
    theme = lexicon.family_of_form[nations]
    sentences = {lexicon.sentence[place] for place in places if lexicon.family[place] == theme}
    words = sum(lexicon.sentence[place] in sentences for place in places)
    assert counted.count((Condition("theme", 0, int(theme)),)) == words > 0


def test_words_and_their_families(counted):
    text = "[Laughter] In 1998, the U.S. paid $1,200.50 for well-known 21st-century art; 5% didn't."
    assert WORD.findall(text) == [
        "[Laughter]", "In", "1998", ",", "the", "U.S.", "paid", "$1,200.50", "for", "well-known", "21st", "-",
        "century", "art", ";", "5%", "didn't", ".",
    ]  # fmt: skip


def test_every_token_belongs_to_the_word_that_holds_its_end(counted, folder):
    opened, lexicon = index.open_index(folder / "index"), counted.lexicon
    for place in (0, 17, 100):
        tokens = range(int(opened.sentences.starts[place]), int(opened.sentences.starts[place + 1]))
        for token, piece in zip(tokens, opened.pieces(opened.sentences.ids[tokens[0] : tokens[-1] + 1]), strict=True):
            assert piece.strip() in lexicon.surfaces[lexicon.surface[lexicon.word_of_token[token]]]


def test_labels_of_another_index(folder):
    with pytest.raises(InputError, match="explains another index than the one given"):
        open_labels(folder / "labels", index_digest="0" * 64)


def shown(config: FeaturesConfig) -> str:
    console = Console(width=150, file=io.StringIO())
    query.run(config, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_search_finds_labels_by_their_words(folder):
    text = shown(FeaturesConfig(folder / "index", "NATIONS", folder / "labels"))
    assert "United Nations" in text
    assert "‘peace’" not in text
    assert "No label has all of the words" in shown(FeaturesConfig(folder / "index", "zebra", folder / "labels"))


def test_one_latent_in_full(folder):
    text = shown(FeaturesConfig(folder / "index", "0", folder / "labels"))
    for expected in ("latent 0", "the word ‘peace’", "promotes:", "best sentences by max", "asked for peace in"):
        assert expected in text


@pytest.mark.parametrize("sort", ["certainty", "density", "max", "latent"])
def test_a_list_of_all_latents_that_fire(folder, sort):
    text = shown(FeaturesConfig(folder / "index", labels=folder / "labels", sort=sort, top=3))
    assert "2 more: raise --top" in text


def test_queries_that_cannot_be_answered(folder):
    with pytest.raises(InputError, match="latent 896 does not exist"):
        shown(FeaturesConfig(folder / "index", "896"))
    with pytest.raises(InputError, match="searching for 'peace' needs labels"):
        shown(FeaturesConfig(folder / "index", "peace"))
    with pytest.raises(InputError, match="top is 0"):
        FeaturesConfig(folder / "index", top=0)
    with pytest.raises(InputError, match="n_items is 0"):
        ExplainConfig(folder / "index", folder / "labels", n_items=0)


def test_white_space_belongs_to_the_next_word():
    """Tokens of "in 19 ": in, a bare space, 1, 9, and a space at the end, which belongs to nothing."""
    ends = np.array([2, 3, 4, 5, 6])
    assert _words_of(ends, starts=[0, 3], ends=[2, 5], first=7).tolist() == [7, 8, 8, 8, -1]
