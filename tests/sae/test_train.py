"""A training run: what it learns, what it is told, what it says of itself, and when it stops."""

import itertools
import math
from pathlib import Path

import pytest
import torch

from monosemy import kernels, options
from monosemy.activations import capture
from monosemy.activations.store import open_activations
from monosemy.activations.stream import Stream
from monosemy.runtime import InputError
from monosemy.sae import train
from monosemy.sae.autoencoder import folded, normalize_rows, open_sae
from monosemy.sae.settings import TrainConfig
from monosemy.sae.tracking import read_history


def column(sae: Path, name: str) -> list:
    return [line[name] for line in read_history(sae) if name in line]


def recorded_steps(monkeypatch) -> dict[int, kernels.Parameters]:
    """Step -> the parameters after it, filled while a training runs."""
    train_step, found = kernels.train_step, {}

    def record(parameters, *rest):
        result = train_step(parameters, *rest)
        found[rest[5]] = parameters.map(torch.clone)
        return result

    monkeypatch.setattr(kernels, "train_step", record)
    return found


def test_training_lowers_the_error(tiny_run: Path):
    fvu = column(tiny_run / "sae", "fvu")
    assert fvu[-1] < 0.5 * fvu[0]
    held_out = column(tiny_run / "sae", "validation_fvu")
    assert len(held_out) == 10
    assert held_out[-1] < 0.7 * held_out[0]


def test_other_settings_for_the_same_folder_are_refused(training_config: TrainConfig):
    train.run(training_config)
    with pytest.raises(InputError, match=r"made with other settings \(config k: 4 then, 5 now\): give another --out"):
        train.run(options.replaced(training_config, k=5))


def test_places_and_pace_are_not_recorded(training_config: TrainConfig, tmp_path: Path):
    """They may change between an interruption and the same command."""
    free = {"checkpoint_every": 3, "keep_checkpoints": 1, "device": "cpu", "latent_shards": 1, "out": tmp_path / "b"}
    whole = train.run(training_config)
    assert train.run(options.replaced(training_config, **free)).digest == whole.digest
    assert not {*free, "activations", "grid", "wandb", "tensorboard"} & set(whole.config)
    assert whole.rows == {"latents": 64, "tokens": 39 * 256}


# ---------------------------------------------------------------------------------------------------------------------
# Schedules
# ---------------------------------------------------------------------------------------------------------------------


def rates(config: TrainConfig, **changes) -> list[float]:
    schedule = options.replaced(config, train_tokens=256 * 100, learning_rate=1.0, **changes)
    return [schedule.learning_rate(step) for step in range(1, 101)]


def test_learning_rate_rises_stays_and_falls(training_config: TrainConfig):
    found = rates(training_config, warmup=0.1, decay=0.3)
    assert found[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert found[10:70] == [1.0] * 60
    assert found[70:] == pytest.approx([i / 31 for i in range(30, 0, -1)])


def test_cosine_falls_slowly_fast_slowly(training_config: TrainConfig):
    found = rates(training_config, warmup=0.0, decay=1.0, schedule="cosine")
    assert found == pytest.approx([(1 - math.cos(math.pi * (101 - step) / 101)) / 2 for step in range(1, 101)])
    drops = [a - b for a, b in itertools.pairwise(found)]
    assert drops[50] == pytest.approx(math.pi / 2 / 101, rel=0.01)
    assert max(drops[0], drops[-1]) < 0.1 * drops[50]


def test_a_share_of_the_rate_is_left(training_config: TrainConfig):
    found = rates(training_config, warmup=0.0, decay=0.5, final_share=0.2)
    assert found[:50] == [1.0] * 50
    assert found[-1] == pytest.approx(0.2 + 0.8 / 51)
    assert rates(training_config, warmup=0.0, final_share=1.0) == [1.0] * 100


def test_a_constant_rate(training_config: TrainConfig):
    assert rates(training_config, warmup=0.02, schedule="constant") == [0.5] + [1.0] * 99


def test_the_rate_that_is_used_is_the_one_in_the_history(training_config: TrainConfig, monkeypatch):
    used, train_step = [], kernels.train_step
    monkeypatch.setattr(kernels, "train_step", lambda *a: (used.append((a[5], a[4].k)), train_step(*a))[1])
    train.run(options.replaced(training_config, log_every=1, train_tokens=256 * 10, start_k=9, anneal=0.5))
    assert used == list(
        zip(column(training_config.out, "learning_rate"), column(training_config.out, "k"), strict=True)
    )


def test_k_falls_to_k(training_config: TrainConfig):
    config = options.replaced(training_config, train_tokens=256 * 100, start_k=24, anneal=0.2)
    assert [config.k_at(step) for step in (1, 6, 11, 16, 21, 100)] == [24, 19, 14, 9, 4, 4]
    assert options.replaced(config, anneal=0.0).k_at(1) == 4
    assert options.replaced(config, start_k=0).k_at(1) == 4


def test_rules_of_rate_and_of_dead_latents(training_config: TrainConfig):
    many = options.replaced(training_config, n_latents=4 * 8192)
    assert many.peak_learning_rate == pytest.approx(
        options.replaced(training_config, n_latents=8192).peak_learning_rate / 2
    )
    assert options.replaced(training_config, n_latents=100).peak_learning_rate == pytest.approx(6e-3)
    assert options.replaced(training_config, learning_rate=0.5).peak_learning_rate == 0.5
    assert training_config.dead_after == 2000
    for train_tokens, rows in ((10_000, 2560), (200_000, 4000), (10**12, 10**7)):  # 10 batches, 2%, 10 million
        assert options.replaced(training_config, dead_after_tokens=None, train_tokens=train_tokens).dead_after == rows


# ---------------------------------------------------------------------------------------------------------------------
# Bad settings
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 65}, "k is 65, but there are only 64 latents"),
        ({"n_latents": 0}, "n_latents is 0; expected at least 1"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0; expected a positive number"),
        ({"learning_rate": math.nan}, "learning_rate is nan; expected a finite number"),
        ({"warmup": 1.5}, r"warmup is 1.5; expected a share, 0 to 1"),
        ({"final_share": -0.5}, r"final_share is -0.5; expected a share, 0 to 1"),
        ({"beta2": 1.0}, r"beta2 is 1.0; expected 0 to 1, below 1"),
        ({"ema": 1.0}, r"ema is 1.0; expected 0 to 1, below 1"),
        ({"epsilon": math.nan}, "epsilon is nan; expected a finite number"),
        ({"weight_decay": math.inf}, "weight_decay is inf; expected a finite number"),
        ({"aux_weight": math.nan}, "aux_weight is nan; expected a finite number"),
        ({"epsilon": 0.0}, "epsilon is 0.0 and weight_decay 0.0; expected above 0, and 0 or more"),
        ({"train_tokens": 100}, "less than one batch of 256"),
        ({"k_aux": -1}, "k_aux is -1 and aux_weight 1.0; expected 0 or more"),
        ({"dead_after_tokens": 0}, "dead_after_tokens is 0; expected at least 1"),
        ({"latent_shards": -1}, "latent_shards is -1; expected 0 or more"),
        ({"start_k": 3}, "start_k is 3; expected from k to n_latents, 4 to 64"),
        ({"start_k": 65}, "start_k is 65; expected from k to n_latents, 4 to 64"),
        ({"prefixes": (16, 16)}, r"prefixes are \(16, 16\); expected ascending sizes below the 64 latents"),
        ({"prefixes": (16, 64)}, r"prefixes are \(16, 64\); expected ascending sizes below the 64 latents"),
        ({"prefixes": (0, 4)}, r"prefixes are \(0, 4\); expected ascending sizes below the 64 latents"),
        ({"l1": 0.1}, "l1 is 0.1, but only --activation relu has that penalty: drop one of them"),
        ({"l1": -0.1, "activation": "relu"}, "l1 is -0.1; expected 0 or more"),
        ({"activation": "relu"}, "nothing but --l1 keeps latents few: give it"),
        (
            {"activation": "relu", "l1": 0.1, "jumprelu": True},
            "relu has no k that a threshold could keep: drop --jumprelu",
        ),
        ({"encoder_scale": 0.0}, "encoder_scale is 0.0; expected a positive number"),
        ({"anneal": 2.0}, "anneal is 2.0; expected a share of the steps, 0 to 1"),
        ({"skip": True}, "--skip is a transcoder's path around the latents: give --target-site too"),
        ({"target_site": "L1.mlp_out"}, "a transcoder cannot know the scale .*: use --normalize dataset"),
        ({"target_site": "nowhere", "normalize": "none"}, "'nowhere' is not a site"),
        ({"log_every": 0}, "log_every is 0; expected at least 1"),
        ({"validations": -1}, "validations is -1; expected 0 or more"),
        ({"patience": 2, "validations": 0}, "patience is 2, but validations is 0: nothing would tell when to stop"),
    ],
)
def test_bad_training_options(training_config: TrainConfig, changes: dict, message: str):
    with pytest.raises(InputError, match=message):
        options.replaced(training_config, **changes)


def test_a_target_that_is_the_site_itself_is_refused(training_config: TrainConfig):
    with pytest.raises(InputError, match="target_site is L1R, the site itself: a transcoder needs another"):
        train.run(options.replaced(training_config, target_site="L1R", normalize="none"))


def test_validation_is_at_the_final_k(training_config: TrainConfig):
    """While k falls, held-out rows are measured as what is saved would treat them."""
    falling = options.replaced(training_config, decoder="free", start_k=64, anneal=1.0, validations=2)
    train.run(falling)
    history = [line for line in read_history(falling.out) if "validation_fvu" in line]
    assert history[-1]["validation_fvu"] < history[0]["validation_fvu"]
    assert history[0]["validation_fvu"] > history[0].get("fvu", 0.0)  # of many latents, not of k


def test_an_average_holds_nothing_of_the_initial_weights(training_config: TrainConfig):
    plain, averaged = training_config, options.replaced(training_config, ema=0.999, out=training_config.out / "ema")
    figures = []
    for config in (plain, averaged):
        train.run(config)
        figures.append([line["validation_fvu"] for line in read_history(config.out) if "validation_fvu" in line][-1])
    assert figures[1] < 1.3 * figures[0]
    assert averaged.memory(1) == pytest.approx(2 / 11)
    assert averaged.memory(10**6) == 0.999


def test_a_training_that_diverged_says_so(training_config: TrainConfig, capsys: pytest.CaptureFixture[str]):
    train.run(options.replaced(training_config, learning_rate=1e4))
    assert (
        "worse than the mean of all rows: this SAE is of no use; try a learning rate below" in capsys.readouterr().err
    )


def test_a_site_that_was_not_captured_is_refused(training_config: TrainConfig):
    for changes in ({"site": "L0.mlp_in"}, {"target_site": "L0.mlp_in", "normalize": "none"}):
        with pytest.raises(InputError, match=r"L0.mlp_in"):
            train.run(options.replaced(training_config, **changes))
        assert not training_config.out.with_name("sae.partial").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Watching
# ---------------------------------------------------------------------------------------------------------------------


def test_a_nan_loss_names_the_step_and_keeps_the_checkpoint(training_config: TrainConfig, monkeypatch):
    train_step = kernels.train_step

    def broken(*arguments):
        result = train_step(*arguments)
        return result._replace(loss=float("nan")) if arguments[6] == 9 else result

    monkeypatch.setattr(kernels, "train_step", broken)
    message = r"sae: the loss became nan at step 9, after 2,048 rows: try a learning rate below 0.006; the last check"
    with pytest.raises(InputError, match=message):
        train.run(training_config)
    assert not training_config.out.exists()
    assert training_config.out.with_name("sae.partial").joinpath("checkpoint-000000007").is_dir()
    monkeypatch.undo()
    assert train.run(training_config).rows["latents"] == 64


def test_weights_that_are_not_finite_are_never_a_checkpoint(training_config: TrainConfig, monkeypatch):
    train_step = kernels.train_step

    def broken(parameters, *rest):
        result = train_step(parameters, *rest)
        if rest[5] == 14:
            parameters.W_enc[3, 3] = math.inf
        return result

    monkeypatch.setattr(kernels, "train_step", broken)
    with pytest.raises(InputError, match="the weights are no longer finite after step 14: the last checkpoint is kept"):
        train.run(training_config)
    kept = sorted(path.name for path in training_config.out.with_name("sae.partial").glob("checkpoint-*"))
    assert kept == ["checkpoint-000000007"]


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_validation_is_what_the_saved_sae_does_on_held_out_rows(training_config: TrainConfig, ema: float):
    config = options.replaced(training_config, validation_rows=300, ema=ema, validations=3)
    train.run(config)
    activations = open_activations(str(config.activations))
    [site] = activations.sites
    rows = Stream(activations, site, 1, 0, validation=True, window_rows=300).first_rows(300)[0]
    assert 200 < len(rows) <= 300
    sae = open_sae(config.out)
    normalized, center, scale = normalize_rows(rows, "token")
    error = (sae(rows) - center) / scale - normalized
    fvu = error.square().sum() / (normalized - normalized.mean(dim=0)).square().sum()
    lines = [line for line in read_history(config.out) if "validation_fvu" in line]
    assert [line["step"] for line in lines] == [13, 26, 39]
    assert lines[-1]["validation_fvu"] == pytest.approx(fvu.item(), rel=1e-3)


def test_no_held_out_rows(training_config: TrainConfig, monkeypatch, capsys):
    monkeypatch.setattr(train.Feed, "held_out", None)
    with pytest.raises(InputError, match="patience is 2, but no rows are held out to tell when to stop"):
        train.run(options.replaced(training_config, patience=2))
    train.run(training_config)
    assert column(training_config.out, "validation_fvu") == []


SCRIPT = [0.9, 0.8, 0.5, 0.6, 0.55, 0.7, 0.1]
"""Held-out FVUs: with a patience of three, the sixth ends the run, and the third was the best."""


def scripted_validations(monkeypatch, config: TrainConfig) -> TrainConfig:
    """A run whose validations say what SCRIPT says, at every fourth step."""
    steps, current, train_step = {4 * (i + 1): fvu for i, fvu in enumerate(SCRIPT)}, [0], kernels.train_step
    monkeypatch.setattr(kernels, "train_step", lambda *a: (current.__setitem__(0, a[6]), train_step(*a))[1])
    monkeypatch.setattr(kernels, "fvu", lambda *_: steps[current[0]])
    return options.replaced(config, train_tokens=28 * 256, validations=7, patience=3, log_every=100)


@pytest.mark.parametrize("normalize", ["token", "dataset"])
def test_patience_stops_and_keeps_the_best_weights(training_config: TrainConfig, monkeypatch, capsys, normalize):
    after = recorded_steps(monkeypatch)
    config = scripted_validations(monkeypatch, options.replaced(training_config, normalize=normalize))
    manifest = train.run(config)
    assert f"{config.out}: stopped at step 24; the best held-out FVU, 0.5000, was at step 12" in capsys.readouterr().err
    assert max(after) == 24
    assert manifest.rows["tokens"] == 24 * 256
    assert column(config.out, "validation_fvu") == SCRIPT[:6]
    assert read_history(config.out)[-1].keys() >= {"fvu", "loss", "dead", "l0"}  # the last line says everything
    scale = 1.0
    if normalize == "dataset":
        activations = open_activations(str(config.activations))
        rows = Stream(activations, activations.sites[0], 256, 0).first_rows(1 << 15)[0]
        scale = 32**0.5 / rows.norm(dim=1).mean().item()
    for name, tensor in folded(after[12], scale, scale).named().items():
        torch.testing.assert_close(getattr(open_sae(config.out).parameters, name), tensor, rtol=1e-5, atol=1e-6)


def test_a_grid_of_runs_that_stop_early(training_config: TrainConfig, monkeypatch, capsys):
    """Whatever step they stop at, the table at the end has all figures."""
    config = scripted_validations(monkeypatch, training_config)
    train.train_all(options.replaced(config, grid=("seed=0,1",)))
    lines = capsys.readouterr().err.splitlines()
    assert sum("held-out 0.7000, L0" in line for line in lines) == 2


def test_an_interrupted_run_stops_at_the_same_step(
    training_config: TrainConfig, tmp_path: Path, monkeypatch, interrupted_training
):
    config = scripted_validations(monkeypatch, training_config)
    whole = train.run(config)
    for stop_at in (11, 16, 23):
        again = options.replaced(config, out=tmp_path / f"again-{stop_at}", checkpoint_every=5)
        interrupted_training(again, stop_at)
        assert train.run(again).digest == whole.digest


# ---------------------------------------------------------------------------------------------------------------------
# Grids
# ---------------------------------------------------------------------------------------------------------------------


def test_a_grid_makes_what_each_makes_alone(training_config: TrainConfig, tmp_path: Path, capsys):
    config = options.replaced(training_config, grid=("k=2,4", "seed=0,1"), train_tokens=2560)
    manifests = train.train_all(config)
    names = ["k=2,seed=0", "k=2,seed=1", "k=4,seed=0", "k=4,seed=1"]
    assert sorted(path.name for path in config.out.iterdir()) == names
    assert [line.split(":")[0] for line in capsys.readouterr().err.splitlines() if ", L0 " in line] == [
        str(config.out / name) for name in names
    ]
    assert len({manifest.digest for manifest in manifests}) == 4
    for member, manifest in zip(config.members(), manifests, strict=True):
        assert (member.k, member.seed) == (manifest.config["k"], manifest.config["seed"])
        alone = train.run(options.replaced(member, out=tmp_path / "alone" / member.out.name))
        assert alone.digest == manifest.digest
    assert [manifest.digest for manifest in train.train_all(config)] == [manifest.digest for manifest in manifests]


def test_a_grid_over_sites(training_config: TrainConfig, tiny_run: Path, tiny_llama_folder: Path, tmp_path: Path):
    """Each SAE is the one that is trained on a capture of its site, also straight from the model."""
    sites, model = ("L0.mlp_out", "L1.resid_post"), str(tiny_llama_folder)
    for name, captured in (("both", sites), ("one", sites[:1]), ("other", sites[1:])):
        capture.run(capture.CaptureConfig(tokens=tiny_run / "tokens", out=tmp_path / name, model=model, sites=captured))
    short = options.replaced(training_config, activations=tmp_path / "both", train_tokens=1280, batch_size=128)
    stored = options.replaced(short, grid=(f"site={','.join(sites)}",), site=sites[0])
    source = {"activations": None, "model": model, "tokens": tiny_run / "tokens"}
    live = options.replaced(stored, out=tmp_path / "live", **source)
    train.train_all(stored)
    train.train_all(live)
    for site, name in zip(sites, ("one", "other"), strict=True):
        alone = options.replaced(short, activations=tmp_path / name, out=tmp_path / f"sae-{name}")
        train.run(alone)
        assert open_sae(alone.out).config.site == site
        for file in ("sae.safetensors", "sae.json", "history.jsonl"):
            for grid in (stored, live):
                assert (grid.out / f"site={site}" / file).read_bytes() == (alone.out / file).read_bytes()


def test_a_grid_of_kinds_and_of_numbers_that_may_be_left_out(training_config: TrainConfig):
    axes = ("activation=topk,batch_topk", "learning-rate=1e-3", "prefixes=8+32", "jumprelu=true,false", "ema=0.5")
    members = options.replaced(training_config, grid=(*axes, "dead_after_tokens=77")).members()
    assert [(m.variant.activation, m.variant.jumprelu) for m in members] == [
        ("topk", True), ("topk", False), ("batch_topk", True), ("batch_topk", False),
    ]  # fmt: skip
    for member in members:
        assert (member.optimizer.learning_rate, member.variant.prefixes, member.optimizer.ema) == (1e-3, (8, 32), 0.5)
        assert member.optimizer.dead_after_tokens == 77
        assert member.grid == ()
    names = "activation=topk,learning_rate=1e-3,prefixes=8+32,jumprelu=true,ema=0.5,dead_after_tokens=77"
    assert members[0].out == training_config.out / names


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (("nonsense=1",), "--grid 'nonsense=1': expected OPTION=VALUE,VALUE with one of site, n_latents, k,"),
        (("k",), "--grid 'k': expected OPTION=VALUE,VALUE"),
        (("k=",), "--grid 'k=': expected OPTION=VALUE,VALUE"),
        (("batch_size=128,256",), "--grid 'batch_size=128,256': expected OPTION=VALUE,VALUE"),
        (("wandb=a,b",), "--grid 'wandb=a,b': expected OPTION=VALUE,VALUE"),
        (("k=2", "k=4"), "--grid names an option twice: k=2 k=4"),
        (("k=two",), "--grid k: 'two' is not a value of that option"),
        (("k=2,",), "--grid k: '' is not a value of that option"),
        (("learning_rate=fast",), "--grid learning_rate: 'fast' is not a value of that option"),
        (("jumprelu=yes",), "--grid jumprelu: 'yes' is not a value of that option"),
        (("prefixes=8-16",), "--grid prefixes: '8-16' is not a value of that option"),
        (("activation=gelu",), "--grid activation: 'gelu' is not a value of that option"),
        (("dead_after_tokens=few",), "--grid dead_after_tokens: 'few' is not a value of that option"),
        (("k=2,900",), "k is 900, but there are only 64 latents"),
    ],
)
def test_bad_grids(training_config: TrainConfig, grid: tuple[str, ...], message: str):
    with pytest.raises(InputError, match=message):
        options.replaced(training_config, grid=grid)


def test_one_that_diverges_leaves_the_others_finished(training_config: TrainConfig, monkeypatch):
    train_step = kernels.train_step

    def broken(*arguments):
        result = train_step(*arguments)
        return result._replace(loss=math.inf) if arguments[4].k == 3 and arguments[6] == 9 else result

    short = options.replaced(training_config, train_tokens=2560)
    alone = train.run(short)
    config = options.replaced(short, grid=("k=2,3,4",), out=short.out.with_name("grid"))
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "train_step", broken)
        with pytest.raises(InputError, match="grid/k=3: the loss became inf at step 9"):
            train.train_all(config)
    assert sorted(path.name for path in config.out.iterdir()) == ["k=2", "k=3.partial", "k=4"]
    finished = train.train_all(config)  # goes on with the one that is missing
    assert finished[2].digest == alone.digest
    assert open_sae(config.out / "k=3").config.k == 3


def test_patience_with_nothing_to_go_by(training_config: TrainConfig, monkeypatch):
    monkeypatch.setattr(kernels, "fvu", lambda *_: float("nan"))
    with pytest.raises(InputError, match="the held-out FVU is nan at step 4, so patience has nothing to go by"):
        train.run(options.replaced(training_config, patience=2))
