"""Names a point in the model, reads it, edits it.

A site is a layer and one of six points inside it, in the order in which a forward pass meets them:

1. `resid_pre`   the residual stream that enters the layer
2. `attn_out`    what attention adds to it
3. `resid_mid`   their sum
4. `mlp_in`      the sum after the norm: what the MLP reads
5. `mlp_out`     what the MLP adds
6. `resid_post`  the residual stream that leaves the layer

`Taps` says which sites one forward pass reads and edits; a model run without taps pays nothing for them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import total_ordering
from typing import cast

from torch import Tensor

from monosemy.runtime import InputError

POINTS = ("resid_pre", "attn_out", "resid_mid", "mlp_in", "mlp_out", "resid_post")
"""Every point of a layer, in the order of the forward pass."""

OTHER_NAMES = {
    # Llama Scope's letters
    "R": "resid_post",
    "A": "attn_out",
    "M": "mlp_out",
    # TransformerLens
    **{f"hook_{point}": point for point in ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")},
    # Hugging Face: the output of the module
    "": "resid_post",
    **dict.fromkeys(("self_attn", "attn", "attention"), "attn_out"),
    "mlp": "mlp_out",
}

PATTERNS = (
    re.compile(r"L(?P<layer>\d+)\.(?P<point>" + "|".join(POINTS) + ")"),
    re.compile(r"L(?P<layer>\d+)(?P<point>[RAM])"),
    re.compile(r"blocks\.(?P<layer>\d+)\.(?P<point>hook_\w+)"),
    re.compile(r"(?:model\.)?layers\.(?P<layer>\d+)(?:\.(?P<point>self_attn|mlp))?"),
    re.compile(r"(?:transformer\.)?h\.(?P<layer>\d+)(?:\.(?P<point>attn|mlp))?"),
    re.compile(r"gpt_neox\.layers\.(?P<layer>\d+)(?:\.(?P<point>attention|mlp))?"),
)


@total_ordering
@dataclass(frozen=True)
class Site:
    """One point of one layer. Sites are ordered as the forward pass meets them."""

    layer: int
    """Counted from 0."""
    point: str
    """One of `POINTS`."""

    def __post_init__(self) -> None:
        if self.layer < 0 or self.point not in POINTS:
            raise InputError(f"layer {self.layer}, point {self.point!r} is not a site: {_expected()}")

    @classmethod
    def parse(cls, name: str) -> Site:
        """The site called `name`, in our own, Llama Scope's, TransformerLens' or Hugging Face's words."""
        for pattern in PATTERNS:
            if match := pattern.fullmatch(name.strip()):
                point = match["point"] or ""
                point = OTHER_NAMES.get(point, point)
                if point in POINTS:
                    return cls(int(match["layer"]), point)
        raise InputError(f"{name!r} is not a site: {_expected()}")

    def __str__(self) -> str:
        return f"L{self.layer}.{self.point}"

    def __lt__(self, other: Site) -> bool:
        return (self.layer, POINTS.index(self.point)) < (other.layer, POINTS.index(other.point))


def _expected() -> str:
    return (
        f"expected L<layer>.<point> with a point of {', '.join(POINTS)}, for example L24.resid_post "
        "(also understood: L24R, L24A, L24M, blocks.24.hook_resid_post, model.layers.24, model.layers.24.mlp)"
    )


def check_site(site: Site, n_layers: int, model_name: str = "the model") -> None:
    """Raise `InputError` if `site` lies beyond the last of `n_layers` layers."""
    if site.layer >= n_layers:
        raise InputError(f"{site}: {model_name} has layers 0 to {n_layers - 1}; name one of them")


Edit = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Taps:
    """Which sites one forward pass reads and which it edits.

    taps = Taps(reads={site}, edits={site: lambda hidden, mask: hidden + direction})
    model(ids, taps=taps)
    taps.values[site]   # (batch, position, d_model), after the edit
    """

    reads: Iterable[Site | str] = field(default_factory=set)
    """Sites, or their names; afterwards, a set of sites."""
    edits: dict[Site, Edit] = field(default_factory=dict)
    """Each receives its site's tensor (batch, position, d_model) and which positions hold a token rather than padding
    (batch, position), and returns what takes the tensor's place. It must not modify the tensor it was given: another
    site may share it."""
    values: dict[Site, Tensor] = field(default_factory=dict)
    """What the last forward pass read."""
    mask: Tensor | None = None
    """Set by the model: where the last forward pass had tokens."""

    def __post_init__(self) -> None:
        self.reads = {Site.parse(site) if isinstance(site, str) else site for site in self.reads}

    @property
    def sites(self) -> set[Site]:
        """Every site that is read or edited."""
        return cast("set[Site]", {*self.reads, *self.edits})

    def check(self, n_layers: int, model_name: str) -> None:
        """Raise `InputError` if a site lies beyond the model."""
        for site in self.sites:
            check_site(site, n_layers, model_name)

    def visit(self, layer: int, point: str, tensor: Tensor) -> Tensor:
        """Called by the model with a site's tensor; returns what it goes on with."""
        site = Site(layer, point)
        if site in self.edits:
            tensor = self._edited(site, tensor)
        if site in self.reads:
            self.values[site] = tensor
        return tensor

    def _edited(self, site: Site, tensor: Tensor) -> Tensor:
        assert self.mask is not None, "a model sets the mask before it visits the first site"
        replacement = self.edits[site](tensor, self.mask)
        if not isinstance(replacement, Tensor) or replacement.shape != tensor.shape:
            returned = tuple(replacement.shape) if isinstance(replacement, Tensor) else type(replacement).__name__
            raise InputError(
                f"the edit at {site} returned shape {returned}; expected that of its input, {tuple(tensor.shape)}"
            )
        return replacement.to(tensor.dtype)
