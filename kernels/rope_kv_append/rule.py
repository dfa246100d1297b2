"""Operand rule of `qpcompile::rope_kv_append`."""

from qpcompile.kernels.rope_kv_write.rule import cache_forms, writing

RULE = writing("qpcompile::rope_kv_append", cache_forms("P"), "P+S")
