#include <config.h>

#include "kernels/kernels.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <sched.h>
#include <sys/mman.h>
#include <unistd.h>
#ifdef TR_HAVE_X86_SIMD
#include <cpuid.h>
#include <sys/syscall.h>
#endif

#include "base/size.h"
#include "kernels/cpu/cpu_priv.h"

/* ---- what a cache row and page are (kernels.h) ---- */

size_t tr_kv_row_bytes(tr_dtype dtype, int d_latent, int d_rope)
{
    size_t latent = (size_t)d_latent, rope = (size_t)d_rope;
    if (dtype == TR_E4M3) return latent + tr_ceil_div(latent, 128) * sizeof(float) + 2 * rope;
    return (latent + rope) * (dtype == TR_BF16 ? 2 : 4);
}

size_t tr_index_page_bytes(tr_dtype dtype, int d_index)
{
    size_t d = (size_t)d_index;
    return TR_PAGE_TOKENS * (dtype == TR_F32 ? d * sizeof(float) : d + sizeof(float));
}

/* ---- memory: in a list so that close finds what release has not ---- */

/* Large blocks (weights, caches) are mapped by themselves and asked to be of huge pages: a core that streams weights
 * reads a third more per second than from pages of 4 KiB (2 cores of a 2.7 GHz Xeon, `trireme bench step`). */
enum { ALIGN = 64, HUGE_PAGE = 2 << 20, LARGE = 2 * HUGE_PAGE };

typedef struct tr_cpu_block {
    struct tr_cpu_block *next, *previous;
    void *base;    /* what free or munmap wants */
    size_t mapped; /* bytes for munmap; 0: free */
} block;

/* Zeros; their pages untouched where the block is large: the thread that fills them first places them. */
static void *map_large(size_t bytes, size_t *mapped)
{
    size_t whole;
    if (!tr_add(&whole, bytes, HUGE_PAGE)) return NULL;
    char *base = mmap(NULL, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED) return NULL;
    /* An aligned run of huge pages inside; what lies around it is given back. */
    const size_t before = (HUGE_PAGE - (uintptr_t)base % HUGE_PAGE) % HUGE_PAGE;
    if (before) munmap(base, before);
    *mapped = whole - before;
    madvise(base + before, *mapped, MADV_HUGEPAGE); /* a wish: some kernels know no such pages */
    return base + before;
}

static tr_status cpu_alloc(tr_device *d, size_t bytes, int kind, void **out)
{
    size_t whole, mapped = 0;
    void *base = NULL;
    (void)kind;
    *out = NULL;
    if (tr_add(&whole, bytes, sizeof(block) + ALIGN))
        base = whole < LARGE ? calloc(1, whole) : map_large(whole, &mapped);
    if (!base) return tr_cpu_fail(d, TR_E_MEMORY, "out of memory: %zu bytes", bytes);
    uintptr_t at = ((uintptr_t)base + sizeof(block) + ALIGN - 1) / ALIGN * ALIGN;
    block *b = (block *)at - 1;
    *b = (block){.next = d->blocks, .base = base, .mapped = mapped};
    if (d->blocks) d->blocks->previous = b;
    d->blocks = b;
    *out = (void *)at;
    return TR_OK;
}

static void unmap(const block *b)
{
    if (b->mapped)
        munmap(b->base, b->mapped);
    else
        free(b->base);
}

static void cpu_release(tr_device *d, void *p)
{
    if (!p) return;
    block *b = (block *)p - 1;
    if (b->next) b->next->previous = b->previous;
    if (b->previous)
        b->previous->next = b->next;
    else
        d->blocks = b->next;
    unmap(b);
}

static uint64_t cpu_memory_left(tr_device *d)
{
    (void)d;
    return 0;
}

static tr_status cpu_upload(tr_device *d, tr_lane lane, void *dst, const void *pinned, size_t n)
{
    (void)d, (void)lane;
    if (n) memcpy(dst, pinned, n);
    return TR_OK;
}

static tr_status cpu_download(tr_device *d, tr_lane lane, void *pinned, const void *src, size_t n)
{
    (void)d, (void)lane;
    if (n) memcpy(pinned, src, n);
    return TR_OK;
}

/* ---- order: operations run at the call, so lanes are in order and every ticket is done ---- */

static tr_status cpu_order(tr_device *d, tr_lane before, tr_lane after)
{
    (void)d, (void)before, (void)after;
    return TR_OK;
}

static uint64_t cpu_ticket(tr_device *d, tr_lane lane)
{
    (void)lane;
    return ++d->ticket;
}

static int cpu_done(tr_device *d, tr_lane lane, uint64_t ticket)
{
    (void)lane;
    return ticket <= d->ticket;
}

tr_status tr_cpu_fail(tr_device *d, tr_status status, const char *fmt, ...)
{
    va_list args;
    va_start(args, fmt);
    vsnprintf(d->head.error, sizeof d->head.error, fmt, args);
    va_end(args);
    return status;
}

static void cpu_close(tr_device *d)
{
    if (!d) return;
    for (block *b = d->blocks, *next; b; b = next) {
        next = b->next;
        unmap(b);
    }
    tr_team_free(d->team);
    free(d);
}

#define OPERATION(name) .name = tr_cpu_##name,
static const tr_ops cpu_ops = {
    .name = "cpu",
    .caps = TR_CAP_F32_KV | TR_CAP_HOST,
    .alloc = cpu_alloc,
    .release = cpu_release,
    .memory_left = cpu_memory_left,
    .upload = cpu_upload,
    .download = cpu_download,
    .order = cpu_order,
    .ticket = cpu_ticket,
    .done = cpu_done,
    .error = tr_device_error,
    .close = cpu_close,
    .linear_bytes = tr_cpu_linear_bytes,
    .linear_pack = tr_cpu_linear_pack,
    .linear_fill = tr_cpu_linear_fill,
    .table_fill = tr_cpu_table_fill,
    .moe_workspace = tr_cpu_moe_workspace,
    .sparse_mla_workspace = tr_cpu_sparse_mla_workspace,
    .sample_workspace = tr_cpu_sample_workspace,
    .ceilings = tr_cpu_ceilings,
    /* clang-format off */
    TR_OPS(OPERATION)
    /* clang-format on */
};

/* ---- the instruction set ---- */

static const char *const isa_name[TR_N_ISAS] = {"plain", "avx2", "avx512", "amx"};

#ifdef TR_HAVE_X86_SIMD
/* Not among the names that clang 14's __builtin_cpu_supports knows: CPUID leaf 1, ECX bit 29. The
 * operating system saves the registers it uses where it does for AVX2. */
static int cpu_has_f16c(void)
{
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}

/* CPUID leaf 7: GFNI in ECX, bit 8; AMX-TILE and AMX-BF16 in EDX, bits 24 and 22. A process asks the system once for
 * the state of the tiles (Linux 5.16); threads that it starts later have the same leave. */
static int cpu_has_amx(void)
{
#ifdef TR_HAVE_AMX
    enum { REQUEST = 0x1023 /* ARCH_REQ_XCOMP_PERM */, TILE_DATA = 18 };
    const unsigned tiles = 1u << 24 | 1u << 22;
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (c & 1u << 8) && (d & tiles) == tiles &&
           syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
#else
    return 0;
#endif
}

static int cpu_has(tr_isa isa)
{
    switch (isa) {
    case TR_ISA_AVX2:
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && cpu_has_f16c();
    case TR_ISA_AVX512:
        return cpu_has(TR_ISA_AVX2) && __builtin_cpu_supports("avx512f") &&
               __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512dq");
    case TR_ISA_AMX:
        return cpu_has(TR_ISA_AVX512) && cpu_has_amx();
    case TR_ISA_PLAIN:
    case TR_N_ISAS:
        break;
    }
    return isa == TR_ISA_PLAIN;
}

/* Worst first; a table's NULL entries come from those before it (merge). */
static const tr_cpu_kernels *const tables[TR_N_ISAS] = {
    &tr_cpu_plain,
    &tr_cpu_avx2,
    &tr_cpu_avx512,
#ifdef TR_HAVE_AMX
    &tr_cpu_amx,
#endif
};
#else
static int cpu_has(tr_isa isa)
{
    return isa == TR_ISA_PLAIN;
}
static const tr_cpu_kernels *const tables[TR_N_ISAS] = {&tr_cpu_plain};
#endif

static tr_status choose_isa(tr_isa *out, const char *name, tr_err *err)
{
    if (!name) {
        for (int i = TR_N_ISAS - 1; i >= 0; i--)
            if (cpu_has((tr_isa)i)) {
                *out = (tr_isa)i;
                return TR_OK;
            }
    }
    for (int i = 0; name && i < TR_N_ISAS; i++) {
        if (strcmp(name, isa_name[i]) != 0) continue;
        *out = (tr_isa)i;
        if (cpu_has(*out)) return TR_OK;
        return tr_fail(err, TR_E_USAGE, "instruction set %s: not in this CPU or this build", name);
    }
    return tr_fail(err, TR_E_USAGE, "instruction set '%s' is none of plain, avx2, avx512, amx",
                   name ? name : "");
}

/* gemm and the order of its weights belong together and are in every table; the rest may come from a lower one. */
static tr_cpu_kernels merge(tr_isa isa)
{
    tr_cpu_kernels k = *tables[isa];
    for (int i = (int)isa - 1; i >= 0; i--) {
        const tr_cpu_kernels *low = tables[i];
        if (!k.transpose) k.transpose = low->transpose;
        if (!k.dot) k.dot = low->dot;
        if (!k.axpy) k.axpy = low->axpy;
        if (!k.expand_e4m3) k.expand_e4m3 = low->expand_e4m3;
        if (!k.expand_bf16) k.expand_bf16 = low->expand_bf16;
        if (!k.exp_sub) k.exp_sub = low->exp_sub;
        if (!k.read_sum) k.read_sum = low->read_sum;
        if (!k.fma_loop) k.fma_loop = low->fma_loop, k.fma_width = low->fma_width;
        if (!k.attention) k.attention = low->attention;
    }
    return k;
}

/* ---- opening ---- */

/* The name is OpenMP's: what batch scripts set for every program. Of a list ("4,2") the first counts. A mask that is
 * too wide for a cpu_set_t cannot be read: then it is the host. */
int tr_device_threads(void)
{
    enum { MOST = 4096 };
    const char *said = getenv("OMP_NUM_THREADS");
    const long wanted = said ? strtol(said, NULL, 10) : 0;
    cpu_set_t set;

    if (wanted > 0) return wanted < MOST ? (int)wanted : MOST;
    if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
    const long n = sysconf(_SC_NPROCESSORS_ONLN);
    return n < 1 ? 1 : n < MOST ? (int)n : MOST;
}

tr_status tr_cpu_open(tr_device **out, const tr_ops **ops, const tr_device_options *options,
                      tr_err *err)
{
    tr_isa isa = TR_ISA_PLAIN;
    tr_status st;

    *out = NULL;
    *ops = NULL;
    if (options->n_threads < 0)
        return tr_fail(err, TR_E_USAGE, "%d threads: must be at least 1", options->n_threads);
    if ((st = choose_isa(&isa, options->isa, err)) != TR_OK) return st;
    if ((st = tr_ops_check(&cpu_ops, err)) != TR_OK) return st;

    tr_device *d = calloc(1, sizeof *d);
    if (!d) return tr_fail(err, TR_E_MEMORY, "out of memory");
    d->n_threads = options->n_threads > 0 ? options->n_threads : tr_device_threads();
    if ((st = tr_team_create(&d->team, d->n_threads, NULL, err)) != TR_OK) {
        free(d);
        return st;
    }
    d->isa = isa;
    d->k = merge(isa);
    snprintf(d->head.describe, sizeof d->head.describe, "cpu, %d thread%s, %s", d->n_threads,
             d->n_threads == 1 ? "" : "s", isa_name[isa]);
    *out = d;
    *ops = &cpu_ops;
    return TR_OK;
}
