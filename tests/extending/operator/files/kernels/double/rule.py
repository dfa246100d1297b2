"""Of double: one tensor of any floating-point type, and a result like it."""

from qpcompile.kernels.rules import Rule

RULE = Rule("qpcompile::double", {"x": "f[..., C]"}, gives=("=x[..., C]",))
