#include <config.h>

#include "kernels/limits.h"

#include <limits.h>
#include <string.h>

enum { QUANT_BLOCK = 128, ANY = INT_MAX };

typedef struct bound {
    const char *what;
    int value, most, step;
} bound;

/* in: where what is too large stands. */
static tr_status check(const char *backend, tr_status how, const char *in, const bound *b, size_t n,
                       tr_err *err)
{
    for (; n > 0; n--, b++) {
        if (b->value > b->most)
            return tr_fail(err, how, "%s%s %d: the %s backend takes at most %d", in, b->what,
                           b->value, backend, b->most);
        if (b->value % b->step != 0)
            return tr_fail(err, how, "%s%s %d: the %s backend takes multiples of %d", in, b->what,
                           b->value, backend, b->step);
    }
    return TR_OK;
}

static const char config[] = "config.json: ";

#define N_OF(table) (sizeof(table) / sizeof *(table))

tr_status tr_cpu_takes(const tr_dims *d, tr_err *err)
{
    const bound bounds[] = {
        {"n_routed_experts", d->n_experts, TR_CPU_EXPERTS_MAX, 1},
        {"kv_lora_rank", d->d_latent, ANY, TR_LATENT_STEP},
        {"kv_lora_rank + qk_rope_head_dim", d->d_latent + d->d_rope, TR_CPU_D_KEY_MAX, 1},
        {"qk_nope_head_dim + qk_rope_head_dim", d->d_nope + d->d_rope, TR_CPU_D_HEAD_MAX, 1},
        {"v_head_dim", d->d_v, TR_CPU_D_HEAD_MAX, 1},
        {"index_head_dim", d->d_index, TR_CPU_D_INDEX_MAX, 1},
    };

    return check("CPU", TR_E_INPUT, config, bounds, N_OF(bounds), err);
}

/* The norm of rows that are not of whole blocks leaves their codes to the product behind it. */
static int normed(int width)
{
    return width % QUANT_BLOCK == 0 ? width : 0;
}

tr_status tr_cuda_takes(const tr_dims *d, tr_err *err)
{
    const bound bounds[] = {
        {"n_routed_experts", d->n_experts, TR_CUDA_EXPERTS_MAX, 1},
        {"hidden_size", normed(d->d_model), TR_CUDA_NORM_MAX, 1},
        {"q_lora_rank", normed(d->d_q_latent), TR_CUDA_NORM_MAX, 1},
        {"kv_lora_rank", d->d_latent, TR_CUDA_D_LATENT_MAX, TR_LATENT_STEP},
        {"kv_lora_rank + qk_rope_head_dim", d->d_latent + d->d_rope, TR_CUDA_D_KEY_MAX, 1},
        {"qk_nope_head_dim", d->d_nope, ANY, TR_CUDA_NOPE_STEP},
        {"qk_nope_head_dim + qk_rope_head_dim", d->d_nope + d->d_rope, TR_CUDA_D_HEAD_MAX, 1},
        {"v_head_dim", d->d_v, TR_CUDA_D_VALUE_MAX, 1},
        {"qk_nope_head_dim + v_head_dim", d->d_nope + d->d_v, TR_CUDA_D_HEAD_MAX, 1},
        {"index_head_dim", d->d_index, TR_CUDA_D_INDEX_MAX, 1},
        {"index_topk", d->k, TR_CUDA_TOPK_MAX, 1},
    };
    const bound asked[] = {
        {"--tp", d->n_parts, TR_CUDA_PARTS_MAX, 1},
        {"--ep times --moe-tp", d->n_moe_members, TR_CUDA_MOE_MEMBERS_MAX, 1},
        {"a sequence of", d->max_context, TR_CUDA_CONTEXT_MAX, 1},
    };

    const tr_status st = check("CUDA", TR_E_INPUT, config, bounds, N_OF(bounds), err);
    return st == TR_OK ? check("CUDA", TR_E_USAGE, "", asked, N_OF(asked), err) : st;
}

tr_status tr_device_takes(const char *name, const tr_dims *dims, tr_err *err)
{
    if (strcmp(name, "cpu") == 0) return tr_cpu_takes(dims, err);
    if (strcmp(name, "cuda") == 0) return tr_cuda_takes(dims, err);
    return tr_fail(err, TR_E_USAGE, "device '%s' is none of cpu, cuda", name);
}
