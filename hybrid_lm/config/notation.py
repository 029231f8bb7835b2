"""Patterns in the notations of other projects, both ways: pure functions on items as `pattern.expand` gives
them.

Every function takes the table from the other notation's symbols to our items (`{"*": "a"}`; `"a+m"` is an
item too). What cannot be said in the other notation is refused with the reason, never approximated. Positions
in messages count from 0, as the indices of layers and blocks do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hybrid_lm.config.pattern import PatternError
from hybrid_lm.registry import unknown

Symbols = Mapping[str, str]


class NotationError(ValueError):
    """Layers that the other notation has no words for, or a table of symbols that does not cover them."""


def from_megatron(text: str, symbols: Symbols) -> tuple[str, ...]:
    """Megatron-LM's `--hybrid-layer-pattern`: one symbol per residual layer.

    Its symbols: M Mamba-2, G gated DeltaNet, * attention, D sparse attention, + latent attention, - MLP, E
    experts.

    Raises:
        PatternError: for `|` and `/`, which say more than layers, and for symbols that the table lacks.
    """
    reasons = {
        "|": "'|' places layers on pipeline stages, which is no part of the architecture; take it out",
        "/": "'/' begins layers for multi-token prediction, which a pattern does not have",
    }
    for at, symbol in enumerate(text):
        if symbol not in symbols or symbol in reasons:
            raise PatternError(reasons.get(symbol) or unknown("symbol", symbol, symbols), text, at + 1)
    if not text:
        raise PatternError("an empty pattern", text, 1)
    return tuple(symbols[symbol] for symbol in text)


def to_megatron(items: Sequence[str], symbols: Symbols) -> str:
    """The string that `from_megatron` reads as these items.

    Raises:
        NotationError: for an item that no symbol stands for.
    """
    back = _reverse(symbols)
    return "".join(_said(back, item, f"layer {at}") for at, item in enumerate(items))


def from_layer_types(layer_types: Sequence[str], symbols: Symbols, ffn: str | None = None) -> tuple[str, ...]:
    """Hugging Face's `layer_types` (or `layers_block_type`).

    Args:
        layer_types: one entry per block.
        symbols: our item for each entry: `{"linear_attention": "g", "full_attention": "a"}`.
        ffn: our item for the feed-forward that ends every block; None if an entry is one residual layer
            (Nemotron-H).

    Raises:
        NotationError: for an entry that the table lacks.
    """
    items: list[str] = []
    for at, entry in enumerate(layer_types):
        if entry not in symbols:
            raise NotationError(f"layer_types[{at}]: {unknown('layer type', entry, symbols)}")
        items += [symbols[entry]] if ffn is None else [symbols[entry], ffn]
    return tuple(items)


def to_layer_types(items: Sequence[str], symbols: Symbols, ffn: str | None = None) -> list[str]:
    """The list that `from_layer_types` reads as these items.

    Raises:
        NotationError: for items that are not blocks of one mixer and `ffn`, or that the table lacks.
    """
    back = _reverse(symbols)
    if ffn is None:
        return [_said(back, item, f"layer {at}") for at, item in enumerate(items)]
    return [_said(back, mixer, f"layer {2 * at}") for at, (mixer, _) in enumerate(_blocks(items, (ffn,)))]


JAMBA_FIELDS = (
    "num_hidden_layers",
    "attn_layer_period",
    "attn_layer_offset",
    "expert_layer_period",
    "expert_layer_offset",
)
JAMBA = {"mamba": "m", "attention": "a", "mlp": "f", "experts": "e"}


def from_jamba(periods: Mapping[str, int], symbols: Symbols = JAMBA) -> tuple[str, ...]:
    """Jamba: block i has attention where i % attn_layer_period == attn_layer_offset, else Mamba; then experts
    by the same rule, else an MLP. Lieber et al. 2024, arXiv:2403.19887, section 3.1.

    Args:
        periods: `JAMBA_FIELDS` as in the model's config.json; `num_hidden_layers` counts blocks.
        symbols: our items for "mamba", "attention", "mlp" and "experts".

    Raises:
        NotationError: for a missing field, an offset that is not below its period, or an item missing in the
            table.
    """
    for needed, given, what in ((JAMBA_FIELDS, periods, "periods"), (JAMBA, symbols, "table of symbols")):
        lacking = [key for key in needed if key not in given]
        if lacking:
            raise NotationError(f"the {what} lacks {', '.join(lacking)}")
    for kind in ("attn", "expert"):
        period, offset = _rule(periods, kind)
        if not 0 <= offset < period:
            raise NotationError(
                f"{kind}_layer_offset = {offset} must be from 0 to {kind}_layer_period - 1 = {period - 1}"
            )
    (attention, attention_at), (experts, experts_at) = _rule(periods, "attn"), _rule(periods, "expert")
    items: list[str] = []
    for block in range(periods["num_hidden_layers"]):
        items.append(symbols["attention" if block % attention == attention_at else "mamba"])
        items.append(symbols["experts" if block % experts == experts_at else "mlp"])
    return tuple(items)


def to_jamba(items: Sequence[str], symbols: Symbols = JAMBA) -> dict[str, int]:
    """The smallest periods, by `JAMBA_FIELDS`, that `from_jamba` reads as these items.

    Raises:
        NotationError: for items that are not blocks of a mixer and a feed-forward, or whose places follow no
            period.
    """
    back = _reverse(symbols)
    blocks = _blocks(items, (symbols["mlp"], symbols["experts"]))
    mixers = [_said(back, mixer, f"layer {2 * at}") for at, (mixer, _) in enumerate(blocks)]
    attention = _period("attention", [mixer == "attention" for mixer in mixers])
    experts = _period("experts", [ffn == symbols["experts"] for _, ffn in blocks])
    return dict(zip(JAMBA_FIELDS, (len(blocks), *attention, *experts), strict=True))


def _rule(periods: Mapping[str, int], kind: str) -> tuple[int, int]:
    return periods[f"{kind}_layer_period"], periods[f"{kind}_layer_offset"]


def _reverse(symbols: Symbols) -> dict[str, str]:
    """Our items to the other notation's symbols; of two symbols for one item, the first."""
    back: dict[str, str] = {}
    for symbol, item in symbols.items():
        back.setdefault(item, symbol)
    return back


def _said(back: Mapping[str, str], item: str, where: str) -> str:
    if item in back:
        return back[item]
    if "+" in item:
        raise NotationError(f"{where}: the parallel layers {item!r} have no symbol in the table")
    raise NotationError(f"{where}: {unknown('layer', item, back)}")


def _blocks(items: Sequence[str], ffns: Sequence[str]) -> list[tuple[str, str]]:
    """Items as blocks of a mixer and a feed-forward."""
    wanted = " or ".join(repr(ffn) for ffn in ffns)
    blocks = []
    for at in range(0, len(items), 2):
        mixer, ffn = items[at], items[at + 1] if at + 1 < len(items) else None
        if mixer in ffns:
            raise NotationError(f"layer {at}: {mixer!r} follows no mixer, and every block begins with one")
        if ffn not in ffns:
            found = "the end" if ffn is None else repr(ffn)
            raise NotationError(f"layer {at}: {mixer!r} must be followed by {wanted}, not by {found}")
        blocks.append((mixer, ffn))
    return blocks


def _period(what: str, places: Sequence[bool]) -> tuple[int, int]:
    """The smallest (period, offset) with places[i] == (i % period == offset)."""
    if True not in places:
        # An offset beyond the last block never comes.
        return len(places) + 1, len(places)
    first = places.index(True)
    second = places.index(True, first + 1) if True in places[first + 1 :] else max(len(places), 2 * first + 1)
    period = second - first
    for block, found in enumerate(places):
        if found != (block % period == first):
            rule = f"{what} in block {first} and {second} means every {period} blocks"
            raise NotationError(
                f"{rule}, but block {block} has {'it' if found else 'none'}: no period says that"
            )
    return period, first
