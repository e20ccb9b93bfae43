"""Probes on labels that are known to be in the latents, or known not to be; and the command from end to end."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from pyarrow import parquet
from scipy.sparse import csr_array

from monosemy import corpus
from monosemy.__main__ import main
from monosemy.activations.capture import length_batches, read_sites
from monosemy.artifact import read_manifest
from monosemy.corpus import DocumentRecord, TokenFile, open_tokens
from monosemy.llm.llama import Llama
from monosemy.llm.sites import Site
from monosemy.runtime import InputError
from monosemy.sae.autoencoder import SparseCode, open_sae
from monosemy.sae.labelled import document_classes, hold_out_documents, label_sentences, usable_classes
from monosemy.sae.pooled import pool_code, pool_sentences
from monosemy.sae.probe import ProbeConfig, fit_probes, run
from monosemy.sae.probe_result import MACRO_MEAN, ProbeRow, load_probe
from monosemy.sae.resampled import METRICS
from monosemy.sae.sparse_probe import Examples, choose_inverse_penalty, fold_documents, standardized_differences

N_DOCUMENTS, PER_DOCUMENT, N_LATENTS, TELLING = 40, 20, 30, 17


def synthetic(n_classes: int = 2, telling: bool = True, seed: int = 0) -> Examples:
    """Documents of one class each, whose sentences have random latents and activations; with `telling`, latent 17 fires
    in the sentences of the last class, and only there, and activation 0 is the class."""
    random = np.random.default_rng(seed)
    document = np.repeat(np.arange(N_DOCUMENTS), PER_DOCUMENT)
    label = document % n_classes
    latents = random.exponential(size=(len(document), N_LATENTS)) * (random.random((len(document), N_LATENTS)) < 0.2)
    activations = random.standard_normal((len(document), 12)).astype(np.float32)
    if telling:
        latents[:, TELLING] = (label == n_classes - 1) * random.uniform(1, 2, len(document))
        activations[:, 0] += 4 * label
    tokens = random.integers(5, 40, len(document))
    return Examples(csr_array(latents), activations, tokens, document, label, document % 10 >= 6)


def probe_config(k: tuple[int, ...] = (1, 3), resamples: int = 1000) -> ProbeConfig:
    nowhere = Path("nowhere")
    return ProbeConfig(label="party", sae=nowhere, tokens=nowhere, out=nowhere, k=k, resamples=resamples)


def only(rows: list[ProbeRow], features: str, k: int | None = None, target: str | None = None) -> ProbeRow:
    """The one row of these `features`."""
    (row,) = (r for r in rows if r.features == features and k in (None, r.k) and target in (None, r.target))
    return row


# ---------------------------------------------------------------------------------------------------------------------
# Probes
# ---------------------------------------------------------------------------------------------------------------------


def test_the_ranking_is_by_correlation_with_the_label():
    examples = synthetic(seed=3)
    dense, positive = examples.latents.toarray(), examples.label == 1
    dense[:, 4], dense[:, 5] = 0.3, 0
    differences, deviations = standardized_differences(csr_array(dense), positive)
    assert differences[4] == deviations[4] == differences[5] == deviations[5] == 0
    varying = deviations > 0
    correlation = np.corrcoef(dense[:, varying].T, positive)[-1, :-1]
    share = positive.mean()
    np.testing.assert_allclose(differences[varying] * np.sqrt(share * (1 - share)), correlation, atol=1e-10)


def test_a_latent_that_is_the_label_is_chosen_and_enough():
    rows = fit_probes(synthetic(), ("a", "b"), probe_config())
    one = only(rows, "latents", 1)
    assert one.target == "b"
    assert [each.latent for each in one.latents] == [TELLING]
    assert one.latents[0].coefficient > 0
    assert one.latents[0].difference > 1
    assert (one.auroc.value, one.auroc.low, one.auroc.high) == (1, 1, 1)
    assert one.accuracy.value == one.balanced_accuracy.value == 1
    assert only(rows, "random latents", 1).auroc.value < 0.75  # 5 draws of 30: the telling one is in one, at most
    assert only(rows, "activations").auroc.value > 0.95
    assert only(rows, "sentence length").auroc.value < 0.6
    majority = only(rows, "majority class")
    assert (majority.k, majority.auroc.value, majority.accuracy.value) == (0, 0.5, 0.5)


def test_labels_that_are_independent_of_latents_are_not_found():
    """The AUROC of a score that does not depend on the label has variance (m + n + 1) / (12 m n) (Mann and Whitney)."""
    for seed in range(3):
        examples = synthetic(telling=False, seed=seed)
        m = n = int(examples.test.sum()) // 2
        bound = 4 * np.sqrt((m + n + 1) / (12 * m * n))  # four standard deviations
        rows = fit_probes(examples, ("a", "b"), probe_config(k=(1, 3, 20), resamples=100))
        for row in rows:
            assert abs(row.auroc.value - 0.5) < bound, row
        assert only(rows, "latents", 1).auroc.low < 0.5 < only(rows, "latents", 1).auroc.high


def test_a_label_that_is_the_length_is_found_by_the_length():
    examples = synthetic(telling=False)
    longer = examples._replace(tokens=examples.tokens + 40 * examples.label)
    assert only(fit_probes(longer, ("a", "b"), probe_config(resamples=5)), "sentence length").auroc.value == 1


def test_several_classes_each_against_the_rest_and_their_mean():
    rows = fit_probes(synthetic(n_classes=4), ("a", "b", "c", "d"), probe_config(resamples=200))
    assert only(rows, "latents", 1, "d").auroc.value == 1
    assert only(rows, "latents", 1, "d").latents[0].latent == TELLING
    assert only(rows, "majority class", target="d").accuracy.value == 0.75
    classes = [only(rows, "latents", 3, name) for name in "abcd"]
    mean = only(rows, "latents", 3, MACRO_MEAN)
    assert mean.latents == ()
    for metric in METRICS:
        each = [getattr(row, metric).value for row in classes]
        assert getattr(mean, metric).value == pytest.approx(np.mean(each))
    assert mean.auroc.low < mean.auroc.value < mean.auroc.high


def test_nothing_is_learnt_from_the_test_side():
    """What is on the test side changes no choice, no coefficient and no penalty."""
    examples = synthetic(seed=1)
    changed = examples.latents.toarray()
    changed[examples.test] = np.random.default_rng(9).exponential(size=changed[examples.test].shape)
    activations = np.where(examples.test[:, None], 100, examples.activations).astype(np.float32)
    other = examples._replace(latents=csr_array(changed), activations=activations)
    for a, b in zip(*(fit_probes(e, ("a", "b"), probe_config(resamples=5)) for e in (examples, other)), strict=True):
        assert (a.latents, a.inverse_penalty, a.k) == (b.latents, b.inverse_penalty, b.k)


def test_the_penalty_is_chosen_by_documents_that_are_held_out():
    """Features that know the document but not the class: fitted on it they look splendid, and held out they do not."""
    random = np.random.default_rng(0)
    document = np.repeat(np.arange(12), 30)
    positive = document % 2 == 0
    fold = fold_documents(positive, document, seed=0)
    assert fold is not None
    assert all(len(set(fold[document == each])) == 1 for each in range(12))
    assert all({*positive[fold == each]} == {True, False} for each in range(3))
    assert fold_documents(document == 0, document, seed=0) is None
    columns = np.eye(12)[document] * 3 + random.standard_normal((360, 12))
    columns[:, 0] += positive
    assert choose_inverse_penalty(columns, positive, document, 0) <= 1e-2
    assert choose_inverse_penalty(columns, document == 0, document, 0) == 1e-4


def test_more_latents_than_fire_are_refused():
    with pytest.raises(
        InputError, match=r"k is 31, but only 30 latents fire in the sentences to fit on: choose a small"
    ):
        fit_probes(synthetic(), ("a", "b"), probe_config(k=(1, 31)))


# ---------------------------------------------------------------------------------------------------------------------
# Labels
# ---------------------------------------------------------------------------------------------------------------------


def documents(**columns: list) -> list[DocumentRecord]:
    """Documents with these fields; None: without the field."""
    records = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    fields = [{name: value for name, value in record.items() if value is not None} for record in records]
    return [DocumentRecord(f"d{number}", False, 1, 9, each) for number, each in enumerate(fields)]


def test_labels_are_fields_cuts_and_decades():
    given = documents(year=[1899, 1946, 1950.0, None], spoken=[True, False, True, None], party=["A", "", "B", "B"])
    assert document_classes(given, "year", 1946) == ["year < 1946", "year >= 1946", "year >= 1946", None]
    assert document_classes(given, "decade", None) == ["1890s", "1940s", "1950s", None]
    assert document_classes(given, "spoken", None) == ["true", "false", "true", None]
    assert document_classes(given, "party", None) == ["A", None, "B", "B"]


def test_labels_that_do_not_do():
    given = documents(year=list(range(1900, 1930)), party=["A"] * 29 + ["B"])
    with pytest.raises(
        InputError, match=r"no document has the field 'Party'; there are party, year, decade \(from year"
    ):
        document_classes(given, "Party", None)
    with pytest.raises(InputError, match=r"no fields at all \(give \.jsonl or \.parquet with some\)"):
        document_classes(documents(x=[None]), "party", None)
    with pytest.raises(InputError, match=r"--at 3 cuts numbers, but party holds text, such as 'A': leave it out"):
        document_classes(given, "party", 3)
    with pytest.raises(InputError, match=r"year is a number with 30 values; .* cut it in two, for example --at 1915"):
        document_classes(given, "year", None)
    with pytest.raises(InputError, match=r"year has one class, 'year < 2000', in all 30 documents; expected two"):
        usable_classes(document_classes(given, "year", 2000), "year")
    with pytest.raises(InputError, match=r"too few documents in 1 of the 2 classes of party: 'B'; expected 2 in each"):
        usable_classes(document_classes(given, "party", None), "party")
    assert usable_classes(["B", "A", None, "A", "B", "C"], "party") == (("A", "B"), ("C",))


def test_a_share_of_every_classs_documents_is_held_out():
    class_of = np.array([0] * 10 + [1] * 2 + [-1] * 3)
    held_out = hold_out_documents(class_of, 0.3, seed=0)
    assert [int(held_out[class_of == number].sum()) for number in (0, 1, -1)] == [3, 1, 0]
    assert [int(hold_out_documents(class_of, 0.99, 0)[class_of == number].sum()) for number in (0, 1)] == [9, 1]
    assert any((hold_out_documents(class_of, 0.3, seed) != held_out).any() for seed in range(1, 5))


@pytest.fixture(scope="module")
def tokens(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Speeches of two parties; those of A speak of harbours and those of B of mountains."""
    folder = tmp_path_factory.mktemp("labelled")
    nouns = {"A": ("harbour", "ship", "sailor"), "B": ("mountain", "valley", "shepherd")}
    records = []
    for number in range(12):
        party = "AB"[number % 2]
        sentences = [f"In year {1900 + number} the {nouns[party][i % 3]} asked for {i + 2} dollars." for i in range(25)]
        records.append(
            {"text": " ".join(sentences), "party": party, "year": 1900 + 5 * number, "speaker": "ABCD"[number % 4]}
        )
    records.append({"text": "This speech is alone in its decade. It has no party.", "year": 1965})
    (folder / "speeches.jsonl").write_text("\n".join(map(json.dumps, records)))
    settings = {"model": str(tiny_llama_folder), "text": (str(folder / "speeches.jsonl"),), "out": folder / "tokens"}
    corpus.run(corpus.TokenizeConfig(**settings))
    return folder / "tokens"


def test_no_document_is_on_both_sides(tokens: Path):
    opened = open_tokens(tokens)
    for seed in range(5):
        chosen = label_sentences(opened, "party", None, 100, 0.3, seed)
        assert not set(chosen.document[chosen.test]) & set(chosen.document[~chosen.test])
        assert (chosen.document == opened.document.numpy()[chosen.sentences]).all()
        assert {opened.documents[d].metadata["party"] for d in chosen.document[chosen.label == 1]} == {"B"}
        sides = [
            int(((chosen.label == label) & (chosen.test == side)).sum()) for label in (0, 1) for side in (False, True)
        ]
        assert sides == [35, 15, 35, 15]
        assert len(np.unique(chosen.sentences)) == 100


def test_few_sentences_and_rows_across_documents_are_refused(tokens: Path, tiny_llama_folder: Path, tmp_path: Path):
    with pytest.raises(InputError, match=r"max_sentences is 19 for 2 classes; expected at least 20, 10 for each"):
        label_sentences(open_tokens(tokens), "party", None, 19, 0.3, 0)
    (tmp_path / "a.txt").write_text("One sentence. Another one. " * 30)
    text, model = (str(tmp_path / "a.txt"),), str(tiny_llama_folder)
    corpus.run(corpus.TokenizeConfig(model=model, text=text, out=tmp_path / "rows", unit="context", context_tokens=16))
    with pytest.raises(InputError, match=r"\(unit context\) run on from one document .* tokenize with --unit sentence"):
        label_sentences(open_tokens(tmp_path / "rows"), "party", None, 100, 0.3, 0)


# ---------------------------------------------------------------------------------------------------------------------
# Pooling
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pool", "expected"), [("max", [[0, 4, 1], [5, 0, 0]]), ("mean", [[0, 2, 0.5], [5, 0, 0]])])
def test_pooled_latents(pool, expected):
    """Two tokens of the first sentence and one of the second; a slot of value 0 is unused, not latent 0."""
    values = torch.tensor([[4.0, 1.0], [0.0, 0.0], [5.0, 0.0]])
    indices = torch.tensor([[1, 2], [0, 0], [0, 0]], dtype=torch.int32)
    code = SparseCode(values, indices, torch.zeros(3, 1), torch.ones(3, 1))
    entries = pool_code(code, torch.tensor([0, 0, 1]), 3, pool)
    dense = csr_array((entries.values.numpy(), (entries.rows.numpy(), entries.columns.numpy())), (2, 3)).toarray()
    np.testing.assert_allclose(dense, expected)


@pytest.mark.parametrize("pool", ["max", "mean"])
def test_a_sentence_is_pooled_over_its_own_tokens_but_sinks(pool, tiny_run: Path, tiny_llama: Llama):
    """As if each sentence were read alone."""
    opened, sae = open_tokens(tiny_run / "tokens"), open_sae(tiny_run / "sae")
    sentences = np.array([2, 5, 60, 61, 200])
    norms = _rows(tiny_llama, opened, 60).norm(dim=1)
    sae.config = type(sae.config)(**{**vars(sae.config), "sink_norm": float(norms.sort().values[-2:].mean())})
    pooled = pool_sentences(tiny_llama, sae, opened, sentences, pool)
    for place, sentence in enumerate(sentences.tolist()):
        rows = _rows(tiny_llama, opened, sentence)
        rows = rows[~sae.is_sink(rows)]
        assert pooled.tokens[place] == len(rows)
        code = sae.encode(rows)
        dense = torch.zeros(len(rows), 64).scatter_add(1, code.indices.long(), code.values)
        expected = dense.amax(dim=0) if pool == "max" else dense.mean(dim=0)
        np.testing.assert_allclose(pooled.latents[[place]].toarray()[0], expected, atol=1e-4)
        np.testing.assert_allclose(pooled.mean[place], rows.mean(dim=0), atol=1e-4)
    assert pooled.tokens[2] < int(opened.lengths[60])


def _rows(model: Llama, opened: TokenFile, sentence: int) -> torch.Tensor:
    site = Site.parse("L1.resid_post")
    (batch,) = length_batches(opened, np.array([sentence]), 1)
    return read_sites(model, batch, [site])[site].clone()


def test_a_sentence_of_sinks_alone_is_empty(tiny_run: Path, tiny_llama: Llama):
    opened, sae = open_tokens(tiny_run / "tokens"), open_sae(tiny_run / "sae")
    sae.config = type(sae.config)(**{**vars(sae.config), "sink_norm": 0.0})
    pooled = pool_sentences(tiny_llama, sae, opened, np.array([3, 4]), "max")
    assert pooled.tokens.tolist() == [0, 0]
    assert pooled.latents.nnz == 0
    assert not pooled.mean.any()


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def command(tiny_run: Path, tiny_llama_folder: Path, tokens: Path, tmp_path: Path) -> list[str]:
    places = ["--sae", str(tiny_run / "sae"), "--tokens", str(tokens), "--out", str(tmp_path / "probe")]
    return ["probe", *places, "--model", str(tiny_llama_folder), "--dtype", "float32", "--resamples", "50"]


def test_the_command_tells_parties_apart(command: list[str], tmp_path: Path, tiny_run: Path, tokens: Path, capsys):
    assert main([*command, "--label", "party", "--k", "5", "1"]) == 0
    shown = capsys.readouterr().out
    assert "party: 'B'" in shown
    assert "monosemy features LATENT" in shown
    result = load_probe(tmp_path / "probe")
    assert result.targets == ["B"]
    assert result.documents_unlabelled == 1
    assert [row.k for row in result.of("B", "latents")] == [1, 5]
    assert [len(row.latents) for row in result.of("B", "latents")] == [1, 5]
    assert result.of("B", "activations")[0].auroc.value > 0.9
    assert [(each.name, each.train_documents, each.test_documents) for each in result.classes] == [
        ("A", 4, 2),
        ("B", 4, 2),
    ]
    table = parquet.read_table(tmp_path / "probe" / "probe.parquet")
    names = ["label", "class", "features", "k", "accuracy", "balanced_accuracy", "auroc", "low", "high"]
    assert table.column_names == names
    assert table.num_rows == len(result.rows) == 8
    assert (tmp_path / "probe" / "probe.png").read_bytes().startswith(b"\x89PNG")
    manifest = read_manifest(tmp_path / "probe", "probe", verify=True)
    assert manifest.config["label"] == "party"
    assert manifest.parents["sae"] == read_manifest(tiny_run / "sae", "sae").digest
    assert manifest.parents["tokens"] == read_manifest(tokens, "tokens").digest


def test_again_it_is_the_same_bytes_and_then_nothing_to_do(command: list[str], tmp_path: Path, capsys):
    again = [part.replace(str(tmp_path / "probe"), str(tmp_path / "again")) for part in command]
    for arguments in (command, again, command):
        assert main([*arguments, "--label", "year", "--at", "1930", "--k", "1"]) == 0
    assert load_probe(tmp_path / "probe").targets == ["year >= 1930"]
    assert "is complete already" in capsys.readouterr().err
    files = [sorted((tmp_path / name).iterdir()) for name in ("probe", "again")]
    assert [file.read_bytes() for file in files[0]] == [file.read_bytes() for file in files[1]]


def test_several_classes_and_one_that_is_left_out(command: list[str], tmp_path: Path, capsys):
    assert main([*command, "--label", "decade", "--k", "1", "--pool", "mean"]) == 0
    captured = capsys.readouterr()
    assert "classes of one document, left out: 1960s" in captured.err
    shown = " ".join(captured.out.split())
    assert "the mean over 6 classes" in shown
    assert "AUROC of each class against the rest" in shown
    result = load_probe(tmp_path / "probe")
    assert result.left_out == ("1960s",)
    assert result.targets == ["1900s", "1910s", "1920s", "1930s", "1940s", "1950s", MACRO_MEAN]
    assert (tmp_path / "probe" / "probe.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--label", "topic"], r"no document has the field 'topic'; there are party, speaker, year, decade"),
        (["--label", "year", "--at", "1800"], r"year has one class, 'year >= 1800', in all 13 documents"),
        (["--label", "year", "--at", "1960"], r"too few documents in 1 of the 2 classes of year: 'year >= 1960'"),
        (["--label", "party", "--k", "0"], r"k is 0; expected different numbers of at least 1"),
        (["--label", "party", "--k", "2", "2"], r"k is 2 2; expected different numbers"),
        (["--label", "party", "--k", "65"], r"k is 65, but the SAE has only 64 latents: choose --k of at most 64"),
        (["--label", "party", "--pool", "sum"], r"--pool.*max.*mean"),
        (["--label", "party", "--test-fraction", "1"], r"test_fraction is 1.0; expected a number between 0 and 1"),
        (["--label", "party", "--resamples", "0"], r"resamples is 0; expected at least 1"),
        (["--label", "party", "--model", "smollm2"], r"SAE was trained on width 32 .*, but .* has width 576"),
        (["--label", "party", "--sae", "nosuch"], r"nosuch is not a folder; expected a 'sae' artifact"),
    ],
)  # fmt: skip
def test_bad_input(arguments, message, command: list[str], tmp_path: Path, capsys):
    try:
        code = main([*command, *arguments])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    captured = capsys.readouterr()
    assert re.search(message, " ".join((captured.err + captured.out).split()))
    assert list(tmp_path.iterdir()) == []


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"package 'sklearn', which is not installed: pip install 'monosemy\[probe\]'"):
        run(probe_config())
