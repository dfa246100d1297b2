"""What `qpcompile::quant_stub` may be given."""

from qpcompile.kernels.rules import Rule

RULE = Rule(
    "qpcompile::quant_stub",
    {
        "x": "f[...]",
    },
    gives=("=x[...]",),
    empty="...",
)
