/* Which sizes a backend can compute: of a model, and of one rank's part of it. Asked by the backend's name before a weight is
 * read, without a device, also in a program that was built without that backend (`plan`). The operations check the same
 * numbers again, each its own: here is where the numbers live. Pure. */
#ifndef TR_KERNELS_LIMITS_H
#define TR_KERNELS_LIMITS_H

#include "base/err.h"

enum { TR_LATENT_STEP = 4 }; /* latents come in so many, on every backend */

enum { /* rows of the CPU's operations lie on the threads' stacks */
       TR_CPU_EXPERTS_MAX = 1024,
       TR_CPU_D_KEY_MAX = 1024,  /* d_latent + d_rope */
       TR_CPU_D_HEAD_MAX = 512,  /* d_nope + d_rope, d_v */
       TR_CPU_D_INDEX_MAX = 256, /* d_index */
};

enum { /* registers and shared memory of the GPU's */
       TR_CUDA_EXPERTS_MAX = 1024,
       TR_CUDA_D_LATENT_MAX = 512,
       TR_CUDA_D_KEY_MAX = 640,   /* d_latent + d_rope */
       TR_CUDA_D_HEAD_MAX = 256,  /* d_nope + d_rope, d_nope + d_v */
       TR_CUDA_D_VALUE_MAX = 128, /* d_v */
       TR_CUDA_NOPE_STEP = 2,
       TR_CUDA_D_INDEX_MAX = 256,
       TR_CUDA_TOPK_MAX = 2048,
       TR_CUDA_CONTEXT_MAX = 1 << 19, /* keys of a row that topk chooses from */
       TR_CUDA_NORM_MAX = 8192, /* of rows of whole blocks of 128, which the norm quantises too */
       TR_CUDA_PARTS_MAX = 64,  /* of the vocabulary, in sample_merge and logprob_merge */
       TR_CUDA_MOE_MEMBERS_MAX = 1024,
};

/* Of a model, behind the names of config.json, and of a rank's part of it. */
typedef struct tr_dims {
    int d_model, d_q_latent; /* hidden_size, q_lora_rank */
    int d_latent, d_rope;    /* kv_lora_rank, qk_rope_head_dim */
    int d_nope, d_v;         /* qk_nope_head_dim, v_head_dim */
    int d_index, k;          /* index_head_dim, index_topk */
    int n_experts;           /* n_routed_experts; 0: no layer of this rank has any */
    int n_parts;             /* members that the vocabulary is cut over */
    int n_moe_members;       /* ranks that rows are sent to, each with some of the experts */
    int max_context;         /* tokens of one sequence; 0: not known */
} tr_dims;

/* TR_E_INPUT: the model has a size that the backend cannot compute; TR_E_USAGE: an option asks for it. One line that names the
 * member of config.json or the option, its value and the limit. */
tr_status tr_cpu_takes(const tr_dims *dims, tr_err *err);
tr_status tr_cuda_takes(const tr_dims *dims, tr_err *err);
/* The same of the backend of that name (tr_ops.name); TR_E_USAGE where there is none. */
tr_status tr_device_takes(const char *name, const tr_dims *dims, tr_err *err);

#endif
