"""A mixture of experts: each token is sent to the few of many MLPs that a router chooses for it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from hybrid_lm.config.base import Positive
from hybrid_lm.layers.base import Context, Layer, LayerOptions, Load, Module, Term
from hybrid_lm.layers.parts import ACTIVATIONS, Linear, zeros
from hybrid_lm.ops import grouped_linear, linear
from hybrid_lm.ops.precision import wide

Rate = Annotated[float, Field(ge=0.0)]


class MoE(Layer):
    """sum of weight_e(x) * expert_e(x) over a token's best experts, plus an expert for all tokens. Shazeer et
    al. 2017, arXiv:1701.06538, equation 1.

    No token is ever dropped: an expert takes as many as are sent to it.
    """

    class Options(LayerOptions):
        """Settings of a mixture of experts."""

        n_experts: Positive = 8
        """Experts to choose from."""
        top_k: Positive = 2
        """Experts that a token is sent to."""
        d_ff: Positive | None = None
        """Inner width of an expert; by default that of a gated MLP, split over the experts of a token, in
        steps of 8."""
        act: Literal["silu", "gelu", "gelu_tanh", "relu", "relu2", "sigmoid", "identity"] = "silu"
        """The nonlinearity of the experts; relu2 is relu(x)^2 (Primer)."""
        gated: bool = True
        """Experts multiply by a second projection (SwiGLU with silu)."""
        bias: bool = False
        """Biases in the experts; the one for all tokens has none."""
        limit: Annotated[float, Field(gt=0.0)] | None = None
        """Experts are (up + 1) * gate * sigmoid(alpha gate), gate at most `limit`, up within +-`limit`
        (GPT-OSS)."""
        alpha: Annotated[float, Field(gt=0.0)] = 1.702
        """Slope of that sigmoid."""
        router: Literal["softmax_topk", "topk_softmax", "sigmoid"] = "softmax_topk"
        """softmax_topk: the largest probabilities (Mixtral); topk_softmax: softmax over the largest logits
        (GPT-OSS); sigmoid: the largest of sigmoid + correction, weighed without it (DeepSeek-V3)."""
        router_bias: bool = False
        renormalise: bool = True
        """Divide the chosen weights by their sum; a softmax over the chosen has done so."""
        scale: float = 1.0
        """Factor on the weights."""
        n_groups: Positive = 1
        """sigmoid: experts are in so many groups (DeepSeek-V3's nodes) ..."""
        top_k_groups: Positive = 1
        """... of which a token may use those with the largest sum of their two best experts."""
        d_latent: Positive | None = None
        """Width at which the experts work, between two projections; null: d_model (Nemotron-H)."""
        d_shared: Annotated[int, Field(ge=0)] = 0
        """Inner width of the expert that all tokens use; 0: none."""
        shared_gate: bool = False
        """Weigh that expert by a sigmoid of the token (Qwen2-MoE)."""
        balance: Literal["none", "loss", "bias"] = "none"
        """How the experts are kept in use. loss: an auxiliary loss (Switch); bias: the correction of experts
        with too few tokens is raised after each step, and that of others lowered (DeepSeek-V3)."""
        balance_factor: Rate = 0.01
        """balance: loss. Factor on the loss, which is 1 if all experts are used alike."""
        balance_rate: Rate = 0.001
        """balance: bias. Change of the correction per step."""
        z_loss: Rate = 0.0
        """Factor on the mean of logsumexp(router logits)^2 (ST-MoE: 1e-3)."""

        def resolved(self, d_in: int) -> dict[str, Any]:
            quiet = {
                "renormalise": self.router == "topk_softmax",
                "alpha": self.limit is None,
                "n_groups": self.top_k_groups == self.n_groups,
                "top_k_groups": self.top_k_groups == self.n_groups,
            }
            silent = self.without_effect(*(key for key, still in quiet.items() if still))
            return {**self.model_dump(), "d_ff": self.inner(d_in), **silent}

        def inner(self, d_in: int) -> int:
            """Inner width of an expert at input width `d_in`."""
            return self.d_ff or -(-8 * d_in // (24 * self.top_k)) * 8

        def check(self, d_in: int) -> Iterable[tuple[str, str]]:
            if self.top_k > self.n_experts:
                yield "top_k", f"{self.top_k} of {self.n_experts} experts; lower top_k or raise n_experts"
            if self.n_experts % self.n_groups:
                yield "n_groups", f"{self.n_groups} does not divide n_experts {self.n_experts}"
            elif self.top_k_groups > self.n_groups:
                yield "top_k_groups", f"{self.top_k_groups} of {self.n_groups} groups; lower it"
            elif self.top_k > self.n_experts // self.n_groups * self.top_k_groups:
                yield "top_k_groups", f"{self.top_k_groups} groups have fewer than top_k {self.top_k} experts"
            if self.router != "sigmoid" and self.n_groups > 1:
                yield "n_groups", f"groups belong to router: sigmoid, this is {self.router}"
            if self.router != "sigmoid" and self.balance == "bias":
                yield "balance", f"bias needs router: sigmoid, {self.router} has no correction; use loss"
            if self.limit is not None and not (self.gated and self.act == "silu"):
                yield "limit", "it belongs to experts with gated: true and act: silu"
            if self.shared_gate and not self.d_shared:
                yield "shared_gate", "there is no shared expert; set d_shared"

    EXAMPLES = (
        {"n_experts": 4, "d_ff": 24, "balance": "loss", "z_loss": 1e-3},
        {"n_experts": 4, "d_ff": 16, "renormalise": False, "d_shared": 24, "shared_gate": True, "scale": 2.0},
        {
            "n_experts": 3,
            "router": "topk_softmax",
            "d_ff": 16,
            "bias": True,
            "router_bias": True,
            "limit": 0.3,
            "alpha": 1.5,
        },
        {
            "n_experts": 6,
            "router": "sigmoid",
            "n_groups": 3,
            "top_k_groups": 2,
            "d_ff": 16,
            "act": "relu2",
            "gated": False,
            "bias": True,
            "d_shared": 20,
            "d_latent": 12,
            "scale": 1.5,
            "balance": "bias",
        },
    )

    def __init__(self, d_in: int, options: Options, *, d_out: int | None = None, parts=None):
        super().__init__(d_in, options, d_out=d_out)
        self.options, o = options, options
        self.router = Router(d_in, o.n_experts, bias=o.router_bias, precise=o.router == "sigmoid")
        if o.router == "sigmoid":
            self.add("router_correction", (o.n_experts,), "dynamics", zeros)
            # It decides only who is chosen, and that has no gradient.
            self.router_correction.requires_grad_(False)
        else:
            self.register_parameter("router_correction", None)
        width = o.d_latent or d_in
        self.latent_in = Linear(d_in, width) if o.d_latent else None
        self.experts = Experts(width, o.inner(d_in), o.d_latent or self.d_out, o)
        self.latent_out = Linear(width, self.d_out, kind="output") if o.d_latent else None
        self.shared = SharedExpert(d_in, self.d_out, o) if o.d_shared else None
        self.shared_gate = Linear(d_in, 1) if o.shared_gate else None

    def forward(self, x: Tensor, state: None, ctx: Context) -> tuple[Tensor, None]:
        rows = x.flatten(0, 1)
        logits = self.router(rows, ctx)
        scores, chosen, weights = self.choose(logits, ctx)
        if ctx.auxiliary is not None:
            self.measure(logits, scores, chosen, ctx)
        inner = rows if self.latent_in is None else self.latent_in(rows, ctx)
        y = self.experts(inner, chosen, weights, ctx)
        if self.latent_out is not None:
            y = self.latent_out(y, ctx)
        y = y.view(*x.shape[:2], self.d_out)
        if self.shared is not None:
            common = self.shared(x, ctx)
            if self.shared_gate is not None:
                common = common * torch.sigmoid(self.shared_gate(x, ctx))
            y = y + common
        return y, state

    def choose(self, logits: Tensor, ctx: Context) -> tuple[Tensor, Tensor, Tensor]:
        """logits (m e) -> scores (m e), the chosen experts (m k) and their weights (m k), in float32."""
        o = self.options
        logits = logits.to(wide(logits))
        scores = logits.sigmoid() if o.router == "sigmoid" else logits.softmax(-1)
        wanted = logits if o.router == "topk_softmax" else scores
        if o.router == "sigmoid":
            wanted = self.permitted(scores.detach() + self.router_correction)
        chosen = wanted.topk(o.top_k).indices
        if ctx.choices is not None:
            chosen = ctx.choices.take(chosen)
        if o.router == "topk_softmax":
            return scores, chosen, logits.gather(-1, chosen).softmax(-1) * o.scale
        weights = scores.gather(-1, chosen)
        if o.renormalise:
            # DeepSeek-V3's constant, here and below, for sigmoids that are all 0.
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return scores, chosen, weights * o.scale

    def permitted(self, scores: Tensor) -> Tensor:
        """scores (m e), -inf outside the best groups. DeepSeek-AI 2024, arXiv:2412.19437, section 2.1.2."""
        o = self.options
        if o.top_k_groups == o.n_groups:
            return scores
        groups = scores.unflatten(-1, (o.n_groups, -1))
        best = groups.topk(min(2, groups.shape[-1])).values.sum(-1).topk(o.top_k_groups).indices
        closed = torch.ones_like(groups[..., 0], dtype=torch.bool).scatter(-1, best, False)
        return groups.masked_fill(closed[..., None], -torch.inf).flatten(-2)

    def measure(self, logits: Tensor, scores: Tensor, chosen: Tensor, ctx: Context) -> None:
        """Hands over how the experts are used by the tokens of this call that are no padding.

        balance: e * sum of share_e * mean score_e, the scores of a token summing to one. Fedus et al. 2021,
        arXiv:2101.03961, equation 4, with all k choices in the shares. router_z: mean of logsumexp^2. Zoph et
        al. 2022, arXiv:2202.08906, equation 5.
        """
        o, auxiliary = self.options, ctx.auxiliary
        assert auxiliary is not None
        if ctx.doc_ids is None:
            real = torch.ones_like(scores[:, 0])
        else:
            real = (ctx.doc_ids.flatten() > 0).to(scores.dtype)
        n = real.sum().clamp(min=1.0)
        counts = torch.zeros_like(scores[0]).index_add(0, chosen.flatten(), real.repeat_interleave(o.top_k))
        # A router that is frozen goes on choosing as it did.
        learns = o.balance == "bias" and self.router.weight.requires_grad
        rate = o.balance_rate if learns else 0.0
        auxiliary.loads.append(Load(counts.detach(), self.router_correction, rate))
        if o.balance == "loss":
            shares = scores / (scores.sum(-1, keepdim=True) + 1e-20)
            mean = (shares * real[:, None]).sum(0) / n
            value = o.n_experts * (counts / (o.top_k * n) * mean).sum()
            auxiliary.terms.append(Term("balance", value, o.balance_factor))
        if o.z_loss:
            value = (logits.to(scores.dtype).logsumexp(-1).square() * real).sum() / n
            auxiliary.terms.append(Term("router_z", value, o.z_loss))


class Router(Module):
    """A logit per expert. `precise`: in float32 whatever the model's type (DeepSeek-V3)."""

    def __init__(self, d_in: int, n_experts: int, *, bias: bool, precise: bool):
        super().__init__()
        self.precise = precise
        self.add("weight", (n_experts, d_in), "matrix")
        if bias:
            self.add("bias", (n_experts,), "bias")
        else:
            self.register_parameter("bias", None)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        """x (m d) -> (m e)."""
        dtype = wide(self.weight) if self.precise else self.weight.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        # Rounding to bfloat16 would choose other experts for tokens that are undecided.
        with torch.autocast(x.device.type, enabled=False):
            return linear(x.to(dtype), self.weight.to(dtype), bias, backend=ctx.backends.get("linear"))


class Experts(Module):
    """MLPs of one shape, each for the rows that chose it. `gate_up` has the rows of the gate, then up's."""

    def __init__(self, d_in: int, d_ff: int, d_out: int, o: MoE.Options):
        super().__init__()
        self.act, self.limit, self.alpha = ACTIVATIONS[o.act], o.limit, o.alpha
        self.used = o.top_k / o.n_experts
        self.first = "gate_up" if o.gated else "up"
        inner = 2 * d_ff if o.gated else d_ff
        for name, shape, kind in (
            (self.first, (o.n_experts, inner, d_in), "matrix"),
            # What writes to the residual stream is behind them if they have a width of their own.
            ("down", (o.n_experts, d_out, d_ff), "matrix" if o.d_latent else "output"),
        ):
            self.add(name, shape, kind)
            if o.bias:
                self.add(f"{name}_bias", shape[:2], "bias")
            else:
                self.register_parameter(f"{name}_bias", None)

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor, ctx: Context) -> Tensor:
        """x (m d_in), the chosen experts (m k) and their weights (m k) -> (m d_out)."""
        m, k = chosen.shape
        expert, order = chosen.flatten().sort(stable=True)
        ends = torch.searchsorted(expert, torch.arange(self.down.shape[0], device=x.device), right=True)
        backend = ctx.backends.get("grouped_linear")
        y = x.index_select(0, order // k)
        y = self.hidden(
            grouped_linear(
                y, getattr(self, self.first), ends, getattr(self, f"{self.first}_bias"), backend=backend
            )
        )
        y = grouped_linear(y, self.down, ends, self.down_bias, backend=backend)
        # Back to the order of the tokens, where the k rows of one are together.
        y = y.index_select(0, order.argsort()).view(m, k, -1)
        return (y * weights[..., None]).sum(1).to(y.dtype)

    def hidden(self, y: Tensor) -> Tensor:
        """What the first product gave -> what the second takes."""
        if self.first == "up":
            return self.act(y)
        gate, up = y.chunk(2, -1)
        if self.limit is None:
            return self.act(gate) * up
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return (up + 1) * gate * torch.sigmoid(self.alpha * gate)


class SharedExpert(Module):
    """The MLP that all tokens go through. Dai et al. 2024, arXiv:2401.06066, section 3.2."""

    def __init__(self, d_in: int, d_out: int, o: MoE.Options):
        super().__init__()
        self.act = ACTIVATIONS[o.act]
        self.gate_proj = Linear(d_in, o.d_shared) if o.gated else None
        self.up_proj = Linear(d_in, o.d_shared)
        self.down_proj = Linear(o.d_shared, d_out, kind="output")

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        """x (b t d_in) -> (b t d_out)."""
        up = self.up_proj(x, ctx)
        hidden = self.act(up) if self.gate_proj is None else self.act(self.gate_proj(x, ctx)) * up
        return self.down_proj(hidden, ctx)
