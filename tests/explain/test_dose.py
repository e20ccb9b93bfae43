"""The search for a strength: what counts as a concept, as an effect and as fluent, and the stage on a real model."""

from pathlib import Path

import pytest
import torch

from monosemy.explain import dose
from monosemy.explain.candidates import Candidate, concept_words, output_scores
from monosemy.explain.dose import DoseConfig, Trial, choose_dose, distinct_pairs, load_choice
from monosemy.latents.labels import Label
from monosemy.llm.llama import Llama
from monosemy.runtime import InputError
from monosemy.sae.autoencoder import open_sae


def make_trial(latent: int, fraction: float, **fields) -> Trial:
    values = {"mentions": False, "read_back": 0.0, "loss": 2.0, "distinct": 1.0, "prompt": "p", "text": "t"} | fields
    return Trial(latent=latent, fraction=fraction, strength=10 * fraction, **values)


def make_label(words: list[tuple[str, float]], label: str = "x") -> Label:
    return Label(3, label, 0.9, {"words": [{"word": word, "lift": lift, "share": 0.1} for word, lift in words]})


def test_a_concept_is_the_telling_words():
    label = make_label([("Nations", 166), ("UN", 1920), ("U.N.", 1920), ("the", 400), ("year", 3), (".", 90)])
    assert concept_words(label) == ("nations", "un", "u.n.")


def test_distinct_pairs():
    assert distinct_pairs("a b c d") == 1
    assert distinct_pairs("solar power solar power solar power") == pytest.approx(2 / 5)
    assert distinct_pairs("one") == 1


def test_the_most_effective_fluent_dose_is_chosen():
    candidates = [Candidate(1, "one", ("x",), 10.0), Candidate(2, "two", ("y",), 10.0)]
    trials = [
        make_trial(1, 0.0), make_trial(2, 0.0),
        make_trial(1, 1.0, mentions=True, loss=4.0),  # effective, but 2 nats worse
        make_trial(1, 0.5, mentions=True, distinct=0.5),  # effective, but repeats itself
        make_trial(2, 0.5), make_trial(2, 1.0, mentions=True, loss=2.9, text="steered"),
    ]  # fmt: skip
    choice = choose_dose(trials, candidates)
    assert (choice.chosen.latent, choice.chosen.fraction, choice.chosen.effect) == (2, 1.0, 1.0)
    assert choice.fluent
    assert choice.chosen.loss_rise == pytest.approx(0.9)
    assert choice.examples == [("p", "t", "steered", True)]


def test_words_that_plain_text_has_too_are_no_effect():
    candidates = [Candidate(1, "one", ("x",), 10.0), Candidate(2, "two", ("y",), 10.0)]
    trials = [
        make_trial(1, 0.0, mentions=True), make_trial(1, 1.0, mentions=True),
        make_trial(2, 0.0), make_trial(2, 1.0, mentions=True),
    ]  # fmt: skip
    assert choose_dose(trials, candidates).chosen.latent == 2


def test_without_a_fluent_dose_the_least_harmful_is_taken_and_said_so():
    trials = [make_trial(1, 0.0), make_trial(1, 0.5, loss=4.0), make_trial(1, 1.0, loss=6.0, mentions=True)]
    choice = choose_dose(trials, [Candidate(1, "one", ("x",), 10.0)])
    assert (choice.chosen.fraction, choice.fluent) == (0.5, False)


def test_output_score_is_what_a_full_pass_gives(tiny_run: Path, tiny_llama: Llama):
    """The layers below the site are shared between latents; the result must not know."""
    from monosemy.steer import Addition, steering

    sae = open_sae(tiny_run / "sae")
    each = Candidate(7, "x", ("peace",), 30.0)
    prompts = ("The people of state", "We")
    p, q = [], []
    tokens = sorted({tiny_llama.tokenizer.encode(form)[0] for form in (" peace", " Peace", " PEACE")})
    with torch.inference_mode():
        for prompt in prompts:
            ids = torch.tensor([tiny_llama.tokenizer.encode(prompt)])
            p.append(tiny_llama(ids, taps=steering(sae, [Addition(7, 30.0)]))[0, -1].softmax(-1)[tokens].sum())
            q.append(tiny_llama(ids)[0, -1].softmax(-1)[tokens].sum())
    expected = sum(a * (a / b).log() for a, b in zip(p, q, strict=True)) / 2
    assert output_scores(tiny_llama, sae, [each], prompts) == [pytest.approx(float(expected), rel=1e-3, abs=1e-9)]


@pytest.fixture
def config(tiny_labels: Path, tiny_llama_folder: Path, tmp_path: Path) -> DoseConfig:
    return DoseConfig(
        sae=tiny_labels / "sae", index=tiny_labels / "index", labels=tiny_labels / "labels", out=tmp_path / "dose",
        model=str(tiny_llama_folder), dtype="float32", latents=(living_latent(tiny_labels),), strengths=(0.5, 2.0),
        prompts=("We must", "The people"), max_new_tokens=6,
    )  # fmt: skip


def living_latent(folder: Path) -> int:
    from monosemy.latents.record import open_index

    return int(open_index(folder / "index").statistics.n_fired.argmax())


def test_stage(config: DoseConfig, capsys):
    dose.run_and_print(config)
    choice = load_choice(config.out)
    assert [d.fraction for d in choice.doses] == [0.5, 2.0]
    assert {d.latent for d in choice.doses} == set(config.latents)
    assert [example[0] for example in choice.examples] == list(config.prompts)
    assert "chosen" in capsys.readouterr().out


def test_texts_do_not_depend_on_what_is_written_side_by_side(config: DoseConfig, tmp_path: Path):
    from dataclasses import replace

    together, alone = dose.run(config), dose.run(replace(config, out=tmp_path / "alone", batch_size=1))
    assert together.files["dose.parquet"] == alone.files["dose.parquet"]


def test_errors(config: DoseConfig):
    from dataclasses import replace

    with pytest.raises(InputError, match=r"strengths are \(nan,\); expected finite numbers"):
        replace(config, strengths=(float("nan"),))
    with pytest.raises(InputError, match="latent 9999 does not exist: this SAE has latents 0 to 63"):
        dose.run(replace(config, latents=(9999,)))
    with pytest.raises(InputError, match="give at least one strength and one prompt"):
        replace(config, strengths=())
    with pytest.raises(InputError, match="n_candidates is 0"):
        replace(config, n_candidates=0)
