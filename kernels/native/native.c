/* The operators' CPU kernels in C, compiled for several instruction sets into one library, called through ctypes.

   Every operator's `cpu.inc` is included once per instruction set (LEVEL), and if it computes in floating point once
   per compute type (REAL): double for float64 rows, float for float32 and bfloat16 ones (kernels/sums.py). The exported
   functions are qp_<name>[_f64 | _f32]_<level>; kernels/native/library.py chooses the level once per process. They
   check their arguments (checks.inc), then call the kernels, which do not.

   Compiled with -ffp-contract=off: where the order of float32 operations is part of an operator's definition it is
   kept, and where contraction is allowed it is written as FMA. */

#include <limits.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#define X86 1
#endif

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define INLINE static inline __attribute__((always_inline, unused))
#define ROUND_UP(n, step) (((n) + (step) - 1) / (step) * (step))

typedef float float_alias __attribute__((may_alias));
typedef uint32_t uint32_alias __attribute__((may_alias));

#include "checks.inc"
#include "calls.inc"

/* The parameters of a row operator without its rows: its cells, checked (rows.inc); unused fields are 0. */
typedef struct {
    long channels, group, left_size, right_size;
    const void *weight, *bias;
    const float *scale, *left, *right, *shift;
    const uint16_t *tiles; /* of kronecker/amx.inc: the factors for AMX, or NULL */
    const float *gates;    /* of activation_quantize/cpu.inc: a function's value for each bfloat16, f32[65536], or NULL */
    double constant;
    float clip, highest; /* the largest code */
    int kind;           /* an index into rows_of, of `enum kind` */
    int element;        /* of the rows */
    int weight_element; /* of weight and bias */
    int rounded;        /* BFLOAT16: a norm is rounded before it is multiplied by its weight */
} rows_plan;
enum kind { PLAIN, RMSNORM, LAYERNORM, SILU, GELU, GELU_TANH, GELU_SIGMOID };

/* Rounds to bfloat16 precision, to nearest even. */
INLINE void round_row(float *values, int element, long n) {
    uint32_alias *bits = (uint32_alias *)values;
    if (element == BFLOAT16)
        for (long i = 0; i < n; i++)
            bits[i] = (bits[i] & 0x7fffffff) > 0x7f800000 ? bits[i]
                                                          : (bits[i] + 0x7fff + ((bits[i] >> 16) & 1)) & 0xffff0000;
}

/* Digest of the sources this library was built from, to detect a stale one. */
#ifndef QP_SOURCES
#define QP_SOURCES ""
#endif
const char *qp_sources(void) { return QP_SOURCES; }

/* The highest level this processor supports: 0 portable, 1 avx2, 2 avx512. */
int qp_level(void) {
#if X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("fma"))
        return 2;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
    return 0;
}

/* Replays recorded calls in order. `step` counts the replays of a tape: each adds one token to the caches, and nothing
   else changes. Returns the result of the last call; at: its index. */
long qp_run_tape(const tape_call *calls, long count, long step, int threads, long *at) {
    long result = DONE;
    for (*at = 0; *at < count && result == DONE; ++*at) result = calls[*at].run(calls[*at].arguments, step, threads);
    --*at;
    return result;
}

/* 1 if the library was built with OpenMP, so that `threads` has an effect. */
int qp_openmp(void) {
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}

#include "tiles.inc"
#include "../kronecker/amx.inc"

#define LEVEL portable
#define VECTOR_BYTES 16
#include "level.inc"
#undef LEVEL
#undef VECTOR_BYTES

#if X86

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define LEVEL avx2
#define AVX2 1
#define VECTOR_BYTES 32
#include "level.inc"
#undef LEVEL
#undef AVX2
#undef VECTOR_BYTES
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"))), \
                             apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,prefer-vector-width=512")
#endif
#define LEVEL avx512
#define AVX512 1
#define VECTOR_BYTES 64
#include "level.inc"
#undef LEVEL
#undef AVX512
#undef VECTOR_BYTES
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif

#include "../linear_int/amx.inc"
#include "../attention/amx.inc"
#include "../token_scores/amx.inc"
