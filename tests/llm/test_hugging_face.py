"""Decoders of `transformers`: what they compute stays what it is, and sites are what they are defined to be.

Every test runs on a tiny random model of each architecture.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch

from monosemy import options
from monosemy.llm.checkpoint import load_model
from monosemy.llm.generate import SamplingSettings, generate
from monosemy.llm.hugging_face import ARCHITECTURES, HuggingFaceModel, load_decoder
from monosemy.llm.llama import Llama
from monosemy.llm.model import LanguageModel, check_sites
from monosemy.llm.sites import POINTS, Site, Taps
from monosemy.llm.tokenizer import Tokenizer
from monosemy.runtime import InputError

VOCABULARY = 1000
IDS = torch.randint(0, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))
CPU = torch.device("cpu")
CLOSE: dict[str, Any] = {"atol": 2e-5, "rtol": 1e-4}

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 8}
GEMMA: dict[str, Any] = {
    "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}  # fmt: skip

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma": ("Gemma", GROUPED),
    "gemma2": ("Gemma2", {**GROUPED, **GEMMA, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0}),
    "gemma3_text": ("Gemma3", {**GROUPED, **GEMMA, "query_pre_attn_scalar": 8}),
    "gpt2": ("GPT2", {"n_inner": 48}),
    "gpt_neox": ("GPTNeoX", {"tie_word_embeddings": False}),
    "gpt_neox in sequence": ("GPTNeoX", {"use_parallel_residual": False}),
    "llama": ("Llama", {**GROUPED, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {**GROUPED, "sliding_window": 5}),
    "olmo2": ("Olmo2", {"num_key_value_heads": 2}),
    "phi3": ("Phi3", {"num_key_value_heads": 2}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 2}),
    "qwen3": ("Qwen3", GROUPED),
}
"""Name -> prefix of its classes in `transformers`, and options."""


def save_random(name: str, folder: Path, **more: Any) -> Path:
    """A random model, large enough in every weight that each part moves the logits."""
    import transformers

    prefix, options = CONFIGS[name]
    config = getattr(transformers, "Gemma3TextConfig" if prefix == "Gemma3" else f"{prefix}Config")
    model = getattr(transformers, "GPT2LMHeadModel" if prefix == "GPT2" else f"{prefix}ForCausalLM")
    model = model(config(**{**SIZES, **options, **more}))
    random = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        noise = torch.randn(weight.shape, generator=random)
        weight.data = noise * weight.shape[-1] ** -0.5 if weight.ndim == 2 else weight.data + 0.1 * noise
    model.save_pretrained(folder)
    return folder


class Pair(NamedTuple):
    """The same model as we run it and as `transformers` does."""

    ours: HuggingFaceModel
    theirs: Any

    @property
    def points(self) -> list[str]:
        return [point for point in POINTS if point != "resid_mid" or not self.ours.config.parallel_residual]

    @property
    def sites(self) -> list[Site]:
        return [Site(layer, point) for layer in range(3) for point in self.points]


def load(folder: Path) -> HuggingFaceModel:
    model = load_decoder(folder, torch.float32, CPU)
    model.name = folder.name
    return model


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request: pytest.FixtureRequest, smollm2_tokenizer: Tokenizer, tmp_path_factory: Any) -> Pair:
    from transformers import AutoModelForCausalLM

    folder = save_random(request.param, tmp_path_factory.mktemp("decoder") / "tiny")
    ours = load(folder)
    ours.tokenizer = smollm2_tokenizer
    return Pair(ours, AutoModelForCausalLM.from_pretrained(folder).eval())


def test_every_architecture_is_tested():
    assert {name.split()[0] for name in CONFIGS} == set(ARCHITECTURES)


def test_logits_are_those_of_transformers(pair: Pair):
    with torch.inference_mode():
        expected = pair.theirs(IDS).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(pair.ours(IDS), expected, **CLOSE)
    assert torch.equal(pair.ours.inner(IDS).logits, expected), "outside of a pass, the hooks do nothing"


def test_every_point_is_what_it_is_defined_to_be(pair: Pair):
    ours, architecture = pair.ours, ARCHITECTURES[pair.ours.config.model_type]
    taps = Taps(reads=pair.sites)
    logits = ours(IDS, taps=taps)
    assert torch.equal(logits, ours(IDS)), "reading must change nothing"
    assert set(taps.values) == set(pair.sites)
    with torch.inference_mode():
        streams = pair.theirs(IDS, output_hidden_states=True).hidden_states
    for layer in range(3):
        at = {point: taps.values[Site(layer, point)] for point in pair.points}
        torch.testing.assert_close(at["resid_pre"], streams[layer], **CLOSE)
        if layer < 2:  # of the last one, transformers shows only what comes out of the final norm
            torch.testing.assert_close(at["resid_post"], streams[layer + 1], **CLOSE)
        module = pair.theirs.base_model.get_submodule(f"{architecture.layers}.{layer}.{architecture.resid_mid}")
        norm = torch.nn.Identity() if architecture.resid_mid == "mlp" else module
        if ours.config.parallel_residual:
            torch.testing.assert_close(at["resid_post"], at["resid_pre"] + at["attn_out"] + at["mlp_out"], **CLOSE)
            torch.testing.assert_close(at["mlp_in"], norm(at["resid_pre"]), **CLOSE)
        else:
            assert torch.equal(at["resid_mid"], at["resid_pre"] + at["attn_out"])
            assert torch.equal(at["resid_post"], at["resid_mid"] + at["mlp_out"])
            torch.testing.assert_close(at["mlp_in"], norm(at["resid_mid"]), **CLOSE)


def edit_by_hook(pair: Pair, site: Site, change: torch.Tensor) -> torch.Tensor:
    """Logits of `transformers` with `change` added at `site` by a hook of its own."""
    architecture = ARCHITECTURES[pair.ours.config.model_type]
    layers = pair.theirs.base_model.get_submodule(architecture.layers)
    number, point = (site.layer, site.point)
    part = layers[number]
    if point not in ("resid_pre", "resid_post"):
        name = {"attn_out": architecture.attn_out, "mlp_in": architecture.mlp, "mlp_out": architecture.mlp_out}[point]
        part = part.get_submodule(name)

    def on_output(_: Any, __: Any, output: Any) -> Any:
        return (output[0] + change, *output[1:]) if isinstance(output, tuple) else output + change

    if point in ("resid_pre", "mlp_in"):
        handle = part.register_forward_pre_hook(lambda _, args: (args[0] + change, *args[1:]))
    else:
        handle = part.register_forward_hook(on_output)
    with torch.inference_mode():
        logits = pair.theirs(IDS).logits
    handle.remove()
    return logits


def test_edits_do_what_hooks_do(pair: Pair):
    change = torch.randn(32, generator=torch.Generator().manual_seed(2))
    plain = pair.ours(IDS)
    for point in pair.points:
        site = Site(1, point)
        taps = Taps(reads={site}, edits={site: lambda tensor, _: tensor + change})
        edited = pair.ours(IDS, taps=taps)
        # What attention adds and the sum behind it move alike.
        expected = edit_by_hook(pair, Site(1, "attn_out") if point == "resid_mid" else site, change)
        torch.testing.assert_close(edited, expected, **CLOSE)
        assert (edited - plain).abs().max() > 1e-3
        untouched = Taps(reads={site})
        pair.ours(IDS, taps=untouched)
        torch.testing.assert_close(taps.values[site], untouched.values[site] + change, **CLOSE)
    assert torch.equal(pair.ours(IDS), plain), "an edit must leave nothing behind"


def test_an_edit_of_resid_mid_reaches_both_the_mlp_and_the_stream(pair: Pair):
    site = Site(1, "resid_mid")
    if pair.ours.config.parallel_residual:
        with pytest.raises(InputError, match=r"L1\.resid_mid: in tiny"):
            pair.ours(IDS, taps=Taps(edits={site: lambda tensor, _: tensor}))
        return
    others = [Site(1, "mlp_in"), Site(1, "mlp_out"), Site(1, "resid_post")]
    plain, edited = Taps(others), Taps(others, {site: lambda tensor, _: torch.zeros_like(tensor)})
    pair.ours(IDS, taps=plain)
    pair.ours(IDS, taps=edited)
    mlp_in, mlp_out, after = (edited.values[other] for other in others)
    assert torch.equal(after, mlp_out)
    assert not torch.allclose(mlp_in, plain.values[others[0]])


def test_layers_in_parts_equal_one_pass(pair: Pair):
    ours, sites = pair.ours, [Site(layer, "resid_post") for layer in range(3)]
    whole = Taps(sites)
    expected = ours.run_layers(ours.embed(IDS), taps=whole)
    hidden = ours.run_layers(ours.embed(IDS), end=0)
    assert torch.equal(hidden, ours.embed(IDS))
    for layer in range(3):
        part = Taps(sites)
        hidden = ours.run_layers(hidden, start=layer, end=layer + 1, taps=part)
        assert list(part.values) == [Site(layer, "resid_post")]
        assert torch.equal(hidden, whole.values[Site(layer, "resid_post")])
    assert torch.equal(hidden, expected)
    assert torch.equal(ours.run_layers(hidden, start=3), hidden)


def test_layers_that_are_not_asked_for_do_not_run(pair: Pair):
    architecture, ran = ARCHITECTURES[pair.ours.config.model_type], []
    layers = pair.ours.base.get_submodule(architecture.layers)
    handles = [
        layer.get_submodule(architecture.mlp).register_forward_hook(lambda *_, number=number: ran.append(number))
        for number, layer in enumerate(layers.children())
    ]
    pair.ours.run_layers(pair.ours.embed(IDS), start=1, end=2)
    for handle in handles:
        handle.remove()
    assert ran == [1]


LENGTHS = torch.tensor([12, 1, 7, 3])
PACKED = torch.randint(0, VOCABULARY, (1, 23), generator=torch.Generator().manual_seed(3))


def test_packed_texts_equal_one_at_a_time(pair: Pair):
    change = torch.randn(32, generator=torch.Generator().manual_seed(4))
    seen = []

    def edit(tensor: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        seen.append((tensor.shape, mask.shape, bool(mask.all())))
        return tensor + change

    edits = {Site(1, "mlp_out"): edit, Site(0, "attn_out"): edit}
    packed = Taps(pair.sites, edits)
    logits = pair.ours(PACKED, taps=packed, lengths=LENGTHS)
    assert set(seen) == {((1, 23, 32), (1, 23), True)}
    start = 0
    for length in LENGTHS.tolist():
        alone, part = Taps(pair.sites, edits), slice(start, start + length)
        torch.testing.assert_close(logits[:, part], pair.ours(PACKED[:, part], taps=alone), **CLOSE)
        for site in pair.sites:
            torch.testing.assert_close(packed.values[site][:, part], alone.values[site], **CLOSE)
        start += length
    before = pair.ours.run_layers(pair.ours.embed(PACKED), end=1, lengths=LENGTHS)
    after = pair.ours.run_layers(before, start=1, lengths=LENGTHS)
    assert torch.equal(pair.ours.unembed(after), pair.ours(PACKED, lengths=LENGTHS))


def test_left_padding_equals_alone(pair: Pair):
    texts = [IDS[0, :12].tolist(), IDS[1, :5].tolist(), IDS[1, 4:11].tolist()]
    ids = torch.tensor([[0] * (12 - len(text)) + text for text in texts])
    mask = torch.tensor([[False] * (12 - len(text)) + [True] * len(text) for text in texts])
    masks = []
    taps = Taps(edits={Site(2, "resid_pre"): lambda tensor, mask: masks.append(mask) or tensor})
    logits = pair.ours(ids, taps=taps, mask=mask)
    assert logits.isfinite().all()
    assert torch.equal(masks[0], mask)
    for row, text in enumerate(texts):
        torch.testing.assert_close(logits[row, -len(text) :], pair.ours(torch.tensor([text]))[0], **CLOSE)


def test_generation_with_cache_equals_a_pass_without(pair: Pair):
    prompts = [IDS[0, :9].tolist(), [40, 41], IDS[1, :5].tolist()]
    change = torch.randn(32, generator=torch.Generator().manual_seed(5))
    for edits in ({}, {Site(1, "resid_post"): lambda tensor, _: tensor + change}):
        taps = Taps(edits=edits)
        steps = list(generate(pair.ours, prompts, SamplingSettings(8, temperature=0), taps))
        for row, prompt in enumerate(prompts):
            continuation = [token for step in steps if (token := step[row]) is not None]
            logits = pair.ours(torch.tensor([prompt + continuation]), taps=taps)[0, len(prompt) - 1 : -1]
            chosen = logits.gather(1, torch.tensor(continuation)[:, None])[:, 0]
            torch.testing.assert_close(chosen, logits.max(dim=-1).values, **CLOSE)


def test_several_new_tokens_at_once_after_a_cache(pair: Pair):
    cache = pair.ours.make_cache(batch=2, capacity=12)
    parts = [pair.ours(IDS[:, part], cache=cache) for part in (slice(0, 7), slice(7, 9), slice(9, 12))]
    assert cache.length == 12
    torch.testing.assert_close(torch.cat(parts, dim=1), pair.ours(IDS), **CLOSE)
    with pytest.raises(InputError, match="13 tokens do not fit in a cache of 12: make a larger one"):
        pair.ours(IDS[:, :1], cache=cache)


def test_a_text_that_is_too_long(pair: Pair):
    with pytest.raises(InputError, match="a text of 129 tokens, but tiny reads at most 128: shorten it"):
        pair.ours(torch.zeros(1, 129, dtype=torch.long))


def test_lengths_that_do_not_fit(pair: Pair):
    with pytest.raises(InputError, match=r"sum to 22 and the input has shape \(1, 23\): expected one row"):
        pair.ours(PACKED, lengths=LENGTHS - torch.tensor([0, 0, 1, 0]))


def test_sites_that_are_not_there(pair: Pair):
    check_sites(pair.ours, pair.sites)
    for check in (lambda taps: check_sites(pair.ours, [*taps.reads]), lambda taps: pair.ours(IDS, taps=taps)):
        with pytest.raises(InputError, match=r"L3\.mlp_out: tiny has layers 0 to 2"):
            check(Taps(reads={Site(3, "mlp_out")}))
        if pair.ours.config.parallel_residual:
            with pytest.raises(InputError, match=r"L1\.resid_mid: in tiny, .* both read resid_pre.*name resid_pre or"):
                check(Taps(reads={Site(1, "resid_mid")}))


def test_a_cache_that_loses_texts(pair: Pair):
    ids = torch.cat((IDS, IDS.flip(1)))
    mask = torch.ones(4, 8, dtype=torch.bool)
    mask[0, :3] = mask[3, :5] = False
    cache = pair.ours.make_cache(batch=4, capacity=12)
    pair.ours(ids[:, :8], mask=mask, cache=cache)
    for rows in (torch.tensor([3, 1, 0]), torch.tensor([1])):  # the second leaves no padding
        cache.select(rows)
        ids, mask = ids[rows], mask[rows]
        before = cache.length
        logits = pair.ours(ids[:, before : before + 2], cache=cache)
        for row, first in enumerate((~mask).sum(dim=1).tolist()):
            alone = pair.ours(ids[row : row + 1, first : before + 2])
            torch.testing.assert_close(logits[row], alone[0, -2:], **CLOSE)


def test_passes_in_two_threads_do_not_meet(pair: Pair):
    site = Site(1, "attn_out")

    def run(change: float) -> torch.Tensor:
        return pair.ours(IDS, taps=Taps(edits={site: lambda tensor, _: tensor + change}))

    expected = [run(change) for change in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for found, wanted in zip(pool.map(run, range(4)), expected, strict=True):
            assert torch.equal(found, wanted)


def test_a_llama_is_our_llama(tiny_llama_folder: Path, tiny_llama: Llama):
    sites = [Site(layer, point) for layer in range(2) for point in POINTS]
    ours, theirs = Taps(sites), Taps(sites)
    model = load(tiny_llama_folder)
    model.tokenizer = tiny_llama.tokenizer
    torch.testing.assert_close(model(IDS, taps=theirs), tiny_llama(IDS, taps=ours), atol=1e-4, rtol=1e-4)
    for site in sites:
        torch.testing.assert_close(theirs.values[site], ours.values[site], **CLOSE)
    assert isinstance(model, LanguageModel)
    assert isinstance(tiny_llama, LanguageModel)
    for name in ("d_model", "n_layers", "vocabulary", "context_length"):
        assert getattr(model.config, name) == getattr(tiny_llama.config, name)


# ---------------------------------------------------------------------------------------------------------------------
# Loading
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpt2_folder(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With SmolLM2's tokenizer. Tests must not write into it."""
    folder = save_random("gpt2", tmp_path_factory.mktemp("gpt2") / "tiny-gpt2", vocab_size=49152)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_llama_folder / file, folder)
    return folder


@pytest.fixture
def changed(gpt2_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """Makes a copy of `gpt2_folder` with other weights or another configuration."""

    def change(weights: Mapping[str, torch.Tensor | None] = MappingProxyType({}), **config: Any) -> Path:
        from safetensors.torch import load_file, save_file

        folder = tmp_path / "changed"
        shutil.copytree(gpt2_folder, folder)
        tensors = {**load_file(folder / "model.safetensors"), **weights}
        tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        written = json.loads((folder / "config.json").read_text()) | config
        (folder / "config.json").write_text(json.dumps(written))
        return folder

    return change


def test_dtype(gpt2_folder: Path):
    model = load_decoder(gpt2_folder, torch.bfloat16, CPU)
    site = Site(1, "resid_mid")
    taps = Taps({site}, {site: lambda tensor, _: tensor.float() + 1})
    assert model(IDS, taps=taps).dtype == torch.float32
    assert taps.values[site].dtype == model.dtype == torch.bfloat16
    assert not any(weight.requires_grad for weight in model.parameters())


def test_names_of_the_hub_s_first_checkpoints(gpt2_folder: Path, changed: Callable[..., Path]):
    """GPT-2's has no prefix, and buffers that are computed today."""
    from safetensors.torch import load_file

    weights: dict[str, torch.Tensor | None] = {}
    for name, tensor in load_file(gpt2_folder / "model.safetensors").items():
        weights |= {name: None, name.removeprefix("transformer."): tensor}
    weights |= {"h.0.attn.bias": torch.ones(1, 1, 128, 128), "h.1.attn.masked_bias": torch.tensor(-1e4)}
    assert torch.equal(load(changed(weights))(IDS), load(gpt2_folder)(IDS))


WEIGHT = "transformer.h.1.mlp.c_fc.weight"


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({WEIGHT: None}, rf"lacks tensors \({WEIGHT}\): it is not a complete gpt2 model"),
        ({"more": torch.ones(2)}, r"has superfluous tensors \(more\)"),
        ({WEIGHT: torch.ones(32, 7)}, rf"has wrongly shaped tensors \({WEIGHT}\)"),
        ({WEIGHT: torch.full((32, 48), torch.nan)}, rf"has not finite tensors \({WEIGHT}\)"),
    ],
    ids=["missing", "superfluous", "shape", "NaN"],
)
def test_damaged_weights(changed: Callable[..., Path], weights: dict[str, Any], message: str, capfd: Any):
    folder = changed(weights)
    with pytest.raises(InputError, match=f"changed {message}"):
        load(folder)
    assert capfd.readouterr() == ("", ""), "transformers must keep its reports to itself"


def test_half_a_file(changed: Callable[..., Path]):
    path = changed() / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError, match=r"changed: transformers cannot load it \(.*\): download the model again"):
        load(path.parent)


def test_pickled_weights_are_not_read(changed: Callable[..., Path]):
    path = changed() / "model.safetensors"
    torch.save({}, path.with_name("pytorch_model.bin"))
    path.unlink()
    with pytest.raises(InputError, match=r"changed: transformers cannot load it \(.*no file named model\.safetensors"):
        load(path.parent)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "mamba"}, r"models of type 'mamba' are not supported; expected one of gemma, gemma2, .*qwen3$"),
        ({"quantization_config": {"bits": 4}}, r"quantization_config = {'bits': 4} is not supported"),
        ({"add_cross_attention": True}, r"add_cross_attention = True is not supported: use a plain model"),
        ({"hidden_size": "wide"}, r"changed: transformers cannot load it"),
        ({"activation_function": "gelo"}, r"changed: transformers cannot load it \(.*gelo"),
    ],
)
def test_configurations_that_are_refused(changed: Callable[..., Path], config: dict[str, Any], message: str):
    folder = changed(**config)
    with pytest.raises(InputError, match=message):
        load(folder)


# ---------------------------------------------------------------------------------------------------------------------
# The whole house on GPT-2
# ---------------------------------------------------------------------------------------------------------------------


def test_from_text_to_steering(gpt2_folder: Path, tmp_path: Path):
    from monosemy import corpus
    from monosemy.activations import capture
    from monosemy.activations.store import open_activations
    from monosemy.latents import index
    from monosemy.sae import evaluate, train
    from monosemy.sae.autoencoder import open_sae
    from monosemy.steer import Addition, steering

    model, site = str(gpt2_folder), Site(1, "resid_mid")
    words = ("war", "peace", "trade", "winter", "gold")
    for number in range(4):
        text = " ".join(f"In {1900 + i} the people asked for {words[(i + number) % 5]}. " for i in range(40))
        (tmp_path / f"{number}.txt").write_text(text)
    paths = {name: tmp_path / name for name in ("tokens", "activations", "sae", "metrics", "index")}
    corpus.run(corpus.TokenizeConfig(model=model, text=(str(tmp_path),), out=paths["tokens"], validation_fraction=0.3))
    capture.run(
        capture.CaptureConfig(
            tokens=paths["tokens"], out=paths["activations"], model=model, dtype="float32", sites=(str(site),),
            stored_as="float32", batch_tokens=256,
        )
    )  # fmt: skip
    train.run(
        options.build(train.TrainConfig, dict(
            activations=paths["activations"], out=paths["sae"], n_latents=48, k=4, train_tokens=5000, batch_size=128,
            dead_after_tokens=2000, k_aux=8,
        ))
    )  # fmt: skip
    evaluate.run(
        evaluate.EvaluateConfig(
            sae=paths["sae"],
            model=model,
            tokens=paths["tokens"],
            out=paths["metrics"],
            dtype="float32",
            loss_tokens=200,
        )
    )
    index.run(
        index.IndexConfig(
            sae=paths["sae"], tokens=paths["tokens"], out=paths["index"], model=model, dtype="float32", n_examples=3
        )
    )
    decoder, sae = load_model(model, "float32"), open_sae(paths["sae"])
    assert isinstance(decoder, HuggingFaceModel)

    shard, table = (
        open_activations(paths["activations"]).shard(site, 0),
        open_activations(paths["activations"]).table(0),
    )
    taps, first = Taps(reads={site}), int(table.sentence[0])
    ids = corpus.open_tokens(paths["tokens"]).sentence(first)[None].long()
    decoder(ids, taps=taps)
    torch.testing.assert_close(shard.rows[: ids.shape[1]], taps.values[site][0], **CLOSE)

    metrics = evaluate.load_metrics(paths["metrics"])
    assert metrics.without_sinks.fvu < 0.9
    behaviour = metrics.behaviour_without_sinks
    assert behaviour.original != behaviour.zero_ablated != behaviour.reconstructed

    prompts = [decoder.tokenizer.encode("In 1945 the people")]
    plain, steered = (
        list(generate(decoder, prompts, SamplingSettings(8, temperature=0), taps))
        for taps in (None, steering(sae, [Addition(3, 500.0)]))
    )
    assert plain != steered
