// Answers about a picture with llama.cpp's public interface, for cpu_llamacpp.py and cpu_llamacpp_export.py. Functions
// return a negative number or NULL for an error; llama.cpp has then said why on stderr.

#include "llama.h"
#include "mtmd-helper.h"
#include "mtmd.h"

#include <cstring>

struct answer {
    llama_model *model;
    llama_context *context;
    mtmd_context *pictures;
    llama_sampler *greedy;
    llama_pos position; // of the next token
};

// A chunk of text tokens and picture tokens; to be freed with mtmd_input_chunks_free.
static mtmd_input_chunks *chunks_of(answer *self, const char *text, const unsigned char *pixels, unsigned side) {
    mtmd_input_chunks *chunks = mtmd_input_chunks_init();
    mtmd_bitmap *picture = mtmd_bitmap_init(side, side, pixels);
    const mtmd_bitmap *pictures[] = {picture};
    const mtmd_input_text prompt = {text, strlen(text), /* add_special */ true, /* parse_special */ true};
    const int failed = mtmd_tokenize(self->pictures, chunks, &prompt, pictures, 1);
    mtmd_bitmap_free(picture);
    if (!failed) return chunks;
    mtmd_input_chunks_free(chunks);
    return nullptr;
}

extern "C" {

// Everything by default but the number of threads and of tokens that fit.
answer *answer_load(const char *model, const char *projector, int threads, int most_tokens) {
    answer *self = new answer();
    llama_backend_init();
    self->model = llama_model_load_from_file(model, llama_model_default_params());
    if (!self->model) return nullptr;
    llama_context_params params = llama_context_default_params();
    params.n_ctx = most_tokens;
    params.n_threads = params.n_threads_batch = threads;
    self->context = llama_init_from_model(self->model, params);
    mtmd_context_params picture_params = mtmd_context_params_default();
    picture_params.use_gpu = false;
    picture_params.n_threads = threads;
    self->pictures = mtmd_init_from_file(projector, self->model, picture_params);
    self->greedy = llama_sampler_init_greedy();
    return self->context && self->pictures ? self : nullptr;
}

// The number of prompt tokens. text holds mtmd's marker where the picture is; pixels: u8[side, side, 3].
int answer_count(answer *self, const char *text, const unsigned char *pixels, unsigned side) {
    mtmd_input_chunks *chunks = chunks_of(self, text, pixels, side);
    if (!chunks) return -1;
    const int count = (int)mtmd_helper_get_n_tokens(chunks);
    mtmd_input_chunks_free(chunks);
    return count;
}

// The first token of an answer; nothing of an earlier prompt is reused.
int answer_first(answer *self, const char *text, const unsigned char *pixels, unsigned side) {
    llama_memory_clear(llama_get_memory(self->context), true);
    mtmd_input_chunks *chunks = chunks_of(self, text, pixels, side);
    if (!chunks) return -1;
    const int batch = (int)llama_n_batch(self->context);
    const int failed =
        mtmd_helper_eval_chunks(self->pictures, self->context, chunks, 0, 0, batch, /* logits_last */ true, &self->position);
    mtmd_input_chunks_free(chunks);
    return failed ? -1 : llama_sampler_sample(self->greedy, self->context, -1);
}

// The token that follows `token`.
int answer_next(answer *self, int token) {
    llama_batch batch = llama_batch_init(1, 0, 1);
    batch.n_tokens = 1;
    batch.token[0] = token;
    batch.pos[0] = self->position++;
    batch.n_seq_id[0] = 1;
    batch.seq_id[0][0] = 0;
    batch.logits[0] = true;
    const int failed = llama_decode(self->context, batch);
    llama_batch_free(batch);
    return failed ? -1 : llama_sampler_sample(self->greedy, self->context, -1);
}

// What `llama-quantize FROM TO TYPE` does.
int answer_quantize(const char *from, const char *to, const char *type) {
    llama_model_quantize_params params = llama_model_quantize_default_params();
    params.nthread = 1;
    if (!strcmp(type, "Q4_0"))
        params.ftype = LLAMA_FTYPE_MOSTLY_Q4_0;
    else if (!strcmp(type, "Q4_K_M"))
        params.ftype = LLAMA_FTYPE_MOSTLY_Q4_K_M;
    else
        return -1;
    return llama_model_quantize(from, to, &params) ? -1 : 0;
}
}
