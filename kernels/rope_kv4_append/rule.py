"""Operand rule of `qpcompile::rope_kv4_append`."""

from qpcompile.kernels.rope_kv4_write.rule import writing

CODES, AFFINE = "u8[B, Hkv, P, ceil(D/2)]", "f32[B, Hkv, P, 2]"
PAST = {"k_codes": CODES, "k_affine": AFFINE, "v_codes": CODES, "v_affine": AFFINE}
RULE = writing("qpcompile::rope_kv4_append", PAST, "u8[B, Hkv, P+S, ceil(D/2)]", "f32[B, Hkv, P+S, 2]")
