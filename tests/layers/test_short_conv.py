"""ShortConv equals transformers' `Lfm2ShortConv` written out: out(C * conv(B * u))."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from hybrid_lm.config.schema import InitConfig
from hybrid_lm.layers.base import Context
from hybrid_lm.layers.short_conv import ShortConv
from hybrid_lm.model.init import initialise


def test_short_conv_is_lfm2s():
    d, t = 10, 9
    layer = ShortConv(d, ShortConv.Options(width=3, bias=True)).double()
    initialise(layer, InitConfig(), n_layers=1)
    x = torch.randn(2, t, d, dtype=torch.float64)
    B, C, u = F.linear(x, layer.in_proj.weight, layer.in_proj.bias).chunk(3, -1)
    v = F.pad((B * u).mT, (2, 0))
    conv = F.conv1d(v, layer.conv_weight[:, None], layer.conv_bias, groups=d).mT
    expected = F.linear(C * conv, layer.out_proj.weight, layer.out_proj.bias)
    y, _ = layer(x, None, Context(torch.zeros(2, t, dtype=torch.int64)))
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-14)  # float64 sums of tens of terms
