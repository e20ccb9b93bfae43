"""Sites: their names, and that they are the points that `transformers` has there."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from monosemy.llm.llama import Llama
from monosemy.llm.sites import POINTS, Site, Taps, check_site
from monosemy.runtime import InputError

pytest_plugins = ["llm_references"]

IDS = torch.randint(0, 49152, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("L24.resid_post", "L24.resid_post"),
        ("L0.mlp_in", "L0.mlp_in"),
        ("L3R", "L3.resid_post"),
        ("L3A", "L3.attn_out"),
        ("L3M", "L3.mlp_out"),
        ("blocks.7.hook_resid_pre", "L7.resid_pre"),
        ("blocks.7.hook_resid_mid", "L7.resid_mid"),
        ("blocks.7.hook_resid_post", "L7.resid_post"),
        ("blocks.7.hook_attn_out", "L7.attn_out"),
        ("blocks.7.hook_mlp_out", "L7.mlp_out"),
        ("model.layers.12", "L12.resid_post"),
        ("model.layers.12.mlp", "L12.mlp_out"),
        ("model.layers.12.self_attn", "L12.attn_out"),
        ("layers.10", "L10.resid_post"),
        ("transformer.h.3.attn", "L3.attn_out"),
        ("gpt_neox.layers.5.mlp", "L5.mlp_out"),
    ],
)
def test_names(name: str, canonical: str):
    site = Site.parse(name)
    assert str(site) == canonical
    assert Site.parse(canonical) == site
    assert len({site, Site.parse(canonical)}) == 1


@pytest.mark.parametrize(
    "name", ["", "24", "L24", "L-1.resid_post", "L24.resid", "L24T", "blocks.3.hook_q", "model.layers.3.norm"]
)
def test_nonsense_names_what_there_is(name: str):
    with pytest.raises(InputError, match=r"is not a site: .*resid_pre, attn_out, resid_mid, mlp_in, mlp_out, resid_po"):
        Site.parse(name)


def test_sites_built_wrongly():
    with pytest.raises(InputError, match="layer 2, point 'hook_q' is not a site"):
        Site(2, "hook_q")


def test_sites_sort_as_the_forward_pass_meets_them():
    sites = [Site(layer, point) for layer in (2, 10) for point in POINTS]
    assert sorted({*sites}) == sites
    assert max(sites) == Site(10, "resid_post")
    assert Site(2, "mlp_in") <= Site(2, "mlp_in") < Site(2, "mlp_out")


def test_site_beyond_the_model(tiny_llama: Llama):
    check_site(Site(29, "mlp_in"), 30)
    with pytest.raises(InputError, match=r"L40\.resid_post: SmolLM2 has layers 0 to 29"):
        check_site(Site.parse("L40.resid_post"), 30, "SmolLM2")
    with pytest.raises(InputError, match=r"L2\.mlp_out: .* has layers 0 to 1"):
        tiny_llama(IDS, taps=Taps(reads={Site(2, "mlp_out")}))


class Reference:
    """The odd Llama of `transformers`, with a hook at every point."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()

    def run(self, edited: Site | None = None, amount: float = 0.0) -> tuple[dict[Site, torch.Tensor], torch.Tensor]:
        values, handles = {}, []

        def visit(site: Site, tensor: torch.Tensor) -> torch.Tensor:
            values[site] = tensor + amount if site == edited else tensor
            return values[site]

        def on_input(site: Site):
            return lambda _, args: (visit(site, args[0]), *args[1:])

        def on_output(site: Site):
            def hook(_: Any, __: Any, output: Any) -> Any:
                if isinstance(output, tuple):
                    return (visit(site, output[0]), *output[1:])
                return visit(site, output)

            return hook

        for number, layer in enumerate(self.model.model.layers):
            handles += [
                layer.register_forward_pre_hook(on_input(Site(number, "resid_pre"))),
                layer.self_attn.register_forward_hook(on_output(Site(number, "attn_out"))),
                layer.mlp.register_forward_pre_hook(on_input(Site(number, "mlp_in"))),
                layer.mlp.register_forward_hook(on_output(Site(number, "mlp_out"))),
                layer.register_forward_hook(on_output(Site(number, "resid_post"))),
            ]
        with torch.inference_mode():
            logits = self.model(IDS).logits
        for handle in handles:
            handle.remove()
        return values, logits


@pytest.fixture(scope="module")
def reference(odd_folder: Path) -> Reference:
    return Reference(odd_folder)


@pytest.fixture(scope="module")
def model(load_llama: Callable[..., Llama], odd_folder: Path) -> Llama:
    return load_llama(odd_folder)


HOOKED = [Site(layer, point) for layer in range(2) for point in POINTS if point != "resid_mid"]


def test_reading_every_point(model: Llama, reference: Reference):
    taps = Taps(reads=[Site(layer, point) for layer in range(2) for point in POINTS])
    logits = model(IDS, taps=taps)
    assert torch.equal(logits, model(IDS)), "reading must change nothing"
    expected, _ = reference.run()
    assert set(taps.values) == {Site(layer, point) for layer in range(2) for point in POINTS}
    for site in HOOKED:
        torch.testing.assert_close(taps.values[site], expected[site], atol=1e-4, rtol=1e-4)
    for layer in range(2):
        before, added = taps.values[Site(layer, "resid_pre")], taps.values[Site(layer, "attn_out")]
        assert torch.equal(taps.values[Site(layer, "resid_mid")], before + added)
        after = taps.values[Site(layer, "resid_mid")] + taps.values[Site(layer, "mlp_out")]
        assert torch.equal(taps.values[Site(layer, "resid_post")], after)


@pytest.mark.parametrize("site", HOOKED, ids=str)
def test_editing_every_point(model: Llama, reference: Reference, site: Site):
    values, expected = reference.run(edited=site, amount=0.5)
    taps = Taps(reads={site}, edits={site: lambda tensor, _: tensor + 0.5})
    torch.testing.assert_close(model(IDS, taps=taps), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(taps.values[site], values[site], atol=1e-4, rtol=1e-4)  # read after the edit


def test_editing_resid_mid_reaches_both_the_mlp_and_the_stream(model: Llama):
    site = Site(0, "resid_mid")
    reads = {site, Site(0, "mlp_in"), Site(0, "mlp_out"), Site(0, "resid_post")}
    plain, edited = Taps(reads), Taps(reads, {site: lambda tensor, _: torch.zeros_like(tensor)})
    model(IDS, taps=plain)
    model(IDS, taps=edited)
    assert not edited.values[Site(0, "mlp_in")].any()
    assert plain.values[Site(0, "mlp_in")].any()
    assert torch.equal(edited.values[Site(0, "resid_post")], edited.values[Site(0, "mlp_out")])


def test_an_edit_is_told_where_tokens_are(model: Llama):
    masks, site = [], Site(1, "attn_out")
    taps = Taps(edits={site: lambda tensor, mask: masks.append(mask.clone()) or tensor})
    padded = torch.ones(IDS.shape, dtype=torch.bool)
    padded[1, :5] = False
    model(IDS, taps=taps, mask=padded)
    model(IDS, taps=taps)
    model(IDS.reshape(1, -1), taps=taps, lengths=torch.tensor([12, 12]))
    assert torch.equal(masks[0], padded)
    assert masks[1].all()
    assert masks[2].shape == (1, 24)


def test_sites_to_read_by_name(model: Llama):
    taps = Taps(reads=["L1.mlp_in"])
    model(IDS, taps=taps)
    assert set(taps.values) == {Site(1, "mlp_in")}


def test_an_edit_that_returns_nothing(model: Llama):
    with pytest.raises(InputError, match=r"edit at L1\.mlp_out returned shape NoneType; expected"):
        model(IDS, taps=Taps(edits={Site(1, "mlp_out"): lambda *_: None}))  # type: ignore[dict-item]


def test_an_edit_keeps_the_model_s_dtype(load_llama: Callable[..., Llama], odd_folder: Path):
    model, site = load_llama(odd_folder, torch.bfloat16), Site(0, "resid_post")
    taps = Taps({site}, {site: lambda tensor, _: tensor.float() + 1})
    model(IDS, taps=taps)
    assert taps.values[site].dtype == torch.bfloat16


def test_an_edit_of_another_shape(model: Llama):
    taps = Taps(edits={Site(1, "mlp_out"): lambda tensor, _: tensor[:, -1]})
    with pytest.raises(InputError, match=r"edit at L1\.mlp_out returned shape \(2, 36\); expected .* \(2, 12, 36\)"):
        model(IDS, taps=taps)
