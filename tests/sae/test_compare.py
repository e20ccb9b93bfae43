"""Several SAEs on the same rows."""

from dataclasses import replace
from pathlib import Path

import pytest

from monosemy import options
from monosemy.__main__ import main
from monosemy.runtime import InputError
from monosemy.sae import compare, train
from monosemy.sae.autoencoder import open_sae
from monosemy.sae.compare import UNKNOWN, CompareConfig, Point, distinct_names, front, load_comparison
from monosemy.sae.evaluate import EvaluateConfig, evaluate
from monosemy.sae.settings import TrainConfig
from monosemy.sae.writers import write_foreign


def point(name: str, l0: float, fvu: float) -> Point:
    return Point(name, 64, "topk", l0, fvu, UNKNOWN, 0.9, UNKNOWN, 0.1, 0.0)


def test_the_front():
    """c is beaten by a in both, d by b in FVU at the same L0; e equals a."""
    points = [point("a", 8, 0.2), point("b", 32, 0.1), point("c", 9, 0.3), point("d", 32, 0.15), point("e", 8, 0.2)]
    assert [of.name for of in front(points)] == ["a", "e", "b"]


def test_names():
    assert distinct_names(("runs/a/sae", "runs/b/sae")) == ["a/sae", "b/sae"]
    assert distinct_names(("x", "org/saes:layers.1")) == ["x", "saes:layers.1"]
    with pytest.raises(InputError, match="an SAE was given twice: x x"):
        distinct_names(("x", "x"))


def test_the_command(tiny_run: Path, tiny_llama_folder: Path, training_config: TrainConfig, tmp_path: Path, capsys):
    """Ours and another library's file of it: the same figures, which are those of `evaluate`; another k beside them."""
    train.run(options.replaced(training_config, k=8, out=tmp_path / "k8"))
    write_foreign(open_sae(tiny_run / "sae"), tmp_path / "lens", "saelens")
    saes = [str(tiny_run / "sae"), str(tmp_path / "lens"), str(tmp_path / "k8")]
    places = ["--tokens", str(tiny_run / "tokens"), "--model", str(tiny_llama_folder), "--out", str(tmp_path / "out")]
    assert main(["compare", "--saes", *saes, *places, "--dtype", "float32", "--loss-tokens", "300"]) == 0
    assert "front" in capsys.readouterr().out
    ours, theirs, other = load_comparison(tmp_path / "out")
    assert (tmp_path / "out" / "pareto.png").read_bytes().startswith(b"\x89PNG")
    assert (ours.l0, other.l0) == (pytest.approx(4, abs=0.5), pytest.approx(8, abs=1))
    assert replace(ours, name="lens").fvu == pytest.approx(theirs.fvu, rel=1e-3)
    assert ours.loss_recovered == pytest.approx(theirs.loss_recovered, abs=1e-3)
    assert ours.fvu_interval[0] <= ours.fvu <= ours.fvu_interval[1]

    from monosemy.corpus import open_tokens
    from monosemy.llm.checkpoint import load_model

    settings = EvaluateConfig(sae=tiny_run / "sae", tokens=tiny_run / "tokens", out=tmp_path, loss_tokens=300)
    model = load_model(str(tiny_llama_folder), "float32")
    alone = evaluate(open_sae(tiny_run / "sae"), model, open_tokens(tiny_run / "tokens"), settings)
    assert alone.without_sinks.fvu == ours.fvu
    assert alone.behaviour_without_sinks.loss_recovered == ours.loss_recovered


def test_what_cannot_be_compared(tiny_run: Path, tiny_llama_folder: Path, tmp_path: Path):
    config = CompareConfig(
        saes=(str(tiny_run / "sae"), str(tmp_path / "lens")), tokens=tiny_run / "tokens", out=tmp_path / "out",
        model=str(tiny_llama_folder),
    )  # fmt: skip
    sae = open_sae(tiny_run / "sae")
    sae.config = replace(sae.config, site="L0.resid_post")
    write_foreign(sae, tmp_path / "lens", "saelens")
    with pytest.raises(InputError, match=r"the SAEs are of L0.resid_post, L1.resid_post: compare those of one site"):
        compare.run(config)
    with pytest.raises(InputError, match="1 SAEs were given; expected two or more"):
        replace(config, saes=config.saes[:1])
    with pytest.raises(InputError, match="max_tokens is 0; expected at least 1"):
        replace(config, max_tokens=0)
    assert not config.out.exists()
