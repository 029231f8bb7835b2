"""Falcon-Mamba: Mamba with RMS norms without weights on dt, B and C. Zuo et al. 2024, arXiv:2410.05355."""

from hybrid_lm.hf.families.mamba import IGNORED, ROWS, RULES
from hybrid_lm.hf.family import Family
from hybrid_lm.hf.fields import Same
from hybrid_lm.hf.layouts import Uniform

FAMILY = Family(
    name="falcon_mamba",
    class_name="FalconMambaForCausalLM",
    layout=Uniform("mamba"),
    rules=(*RULES, Same("mixer_rms_eps", "mamba.inner_norm_eps")),
    fixed={"mamba.inner_norm": "weightless"},
    ignored=IGNORED,
    rows=ROWS,
)
