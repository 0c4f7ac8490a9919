/* Peer memory and the kernels over it, where the GPU is the host: memory that cudaMalloc gives is a file of this process, and other
 * processes map it. The kernels do what those in kernels/cuda/peer.cu do, with numbers of 4 bytes (the CPU's activations), on the
 * thread that launches them: to wait there is to look again and again, for as long as the abort word is 0.
 *
 * FAKE_PEERS: "unreachable": no device reaches another's memory; "closed": opening it fails for the last rank of the world;
 * "none": a member has none to export; "damaged": what is stored in another's memory arrives as something else. */
#define _GNU_SOURCE /* memfd_create */
#include <config.h>

#include <fcntl.h>
#include <sched.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <mpi.h>

#include "kernels/cuda/peer.h"
#include "tests/fake_nccl/fake.h"

enum { BUFFERS = 3, ONE_ROWS = 64 };
enum { EPOCH, ARRIVED, LEFT };

typedef struct block { /* memory of this process, or another's */
    struct block *next;
    void *memory;
    size_t bytes;
    int fd;
} block;

typedef struct handle { /* in a cudaIpcMemHandle_t */
    int pid, fd;
    size_t bytes;
} handle;

static block *blocks; /* what the real one keeps in its library */

bool fake_told(const char *what)
{
    const char *v = getenv("FAKE_PEERS");
    return v && strcmp(v, what) == 0;
}

/* ---- memory --------------------------------------------------------------------------------------------------------- */

static cudaError_t map(void **out, int fd, size_t bytes)
{
    block *b = calloc(1, sizeof *b);

    if (!b || fd < 0) {
        free(b);
        return cudaErrorInvalidValue;
    }
    b->memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (b->memory == MAP_FAILED) {
        free(b);
        return cudaErrorMemoryAllocation;
    }
    b->bytes = bytes;
    b->fd = fd;
    b->next = blocks;
    blocks = b;
    *out = b->memory;
    return cudaSuccess;
}

static cudaError_t unmap(void *memory)
{
    for (block **at = &blocks; *at; at = &(*at)->next) {
        block *b = *at;
        if (b->memory != memory) continue;
        *at = b->next;
        munmap(b->memory, b->bytes);
        close(b->fd);
        free(b);
        return cudaSuccess;
    }
    return cudaErrorInvalidValue;
}

cudaError_t cudaMalloc(void **out, size_t bytes)
{
    const int fd = memfd_create("fake-gpu", MFD_CLOEXEC);

    if (fd < 0 || ftruncate(fd, (off_t)bytes) != 0) {
        if (fd >= 0) close(fd);
        return cudaErrorMemoryAllocation;
    }
    const cudaError_t e = map(out, fd, bytes);
    if (e != cudaSuccess) close(fd);
    return e;
}

cudaError_t cudaFree(void *p)
{
    return unmap(p);
}

cudaError_t cudaMemset(void *p, int value, size_t bytes)
{
    memset(p, value, bytes);
    return cudaSuccess;
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, int how)
{
    (void)how;
    memmove(to, from, bytes);
    return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize(void)
{
    return cudaSuccess;
}

cudaError_t cudaHostAlloc(void **out, size_t bytes, unsigned flags)
{
    (void)flags;
    *out = malloc(bytes);
    return *out ? cudaSuccess : cudaErrorMemoryAllocation;
}

cudaError_t cudaFreeHost(void *p)
{
    free(p);
    return cudaSuccess;
}

cudaError_t cudaHostGetDevicePointer(void **out, void *p, unsigned flags)
{
    (void)flags;
    *out = p;
    return cudaSuccess;
}

/* ---- other processes ------------------------------------------------------------------------------------------------- */

static int rank_of_world(int *size)
{
    int rank;

    MPI_Comm_size(MPI_COMM_WORLD, size);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    return rank;
}

cudaError_t cudaDeviceGetPCIBusId(char *id, int room, int device)
{
    int size;
    snprintf(id, (size_t)room, "0000:%02x:0%d.0", (unsigned)rank_of_world(&size), device);
    return cudaSuccess;
}

/* Device 0 is this rank's, device 1 + r that of rank r. By the bus of the table of ranks (fake_nccl.c) as many are seen as
 * FAKE_PEERS says, as a number. */
cudaError_t cudaDeviceGetByPCIBusId(int *device, const char *id)
{
    const char *seen = getenv("FAKE_PEERS");
    const long n = strtol(id + 5, NULL, 16);

    *device = 1 + (int)n;
    if (strncmp(id, "fa4e:", 5) != 0) return cudaSuccess;
    return seen && n < strtol(seen, NULL, 10) ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer)
{
    *can = device == 0 && peer > 0 && !fake_told("unreachable");
    return cudaSuccess;
}

cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t *out, void *memory)
{
    if (fake_told("none")) return cudaErrorInvalidValue;
    for (const block *b = blocks; b; b = b->next) {
        if (b->memory != memory) continue;
        const handle h = {.pid = (int)getpid(), .fd = b->fd, .bytes = b->bytes};
        memcpy(out->reserved, &h, sizeof h);
        return cudaSuccess;
    }
    return cudaErrorInvalidValue;
}

cudaError_t cudaIpcOpenMemHandle(void **out, cudaIpcMemHandle_t given, unsigned flags)
{
    char path[64];
    handle h;
    int size;

    (void)flags;
    if (fake_told("closed") && rank_of_world(&size) == size - 1) return cudaErrorInvalidValue;
    memcpy(&h, given.reserved, sizeof h);
    snprintf(path, sizeof path, "/proc/%d/fd/%d", h.pid, h.fd);
    const int fd = open(path, O_RDWR | O_CLOEXEC);
    const cudaError_t e = map(out, fd, h.bytes);
    if (e != cudaSuccess && fd >= 0) close(fd);
    return e;
}

cudaError_t cudaIpcCloseMemHandle(void *memory)
{
    return unmap(memory);
}

/* ---- the kernels ------------------------------------------------------------------------------------------------------ */

static int rows_in(int n_members, int rows)
{
    const int some = rows < ONE_ROWS ? rows : ONE_ROWS, part = (rows + n_members - 1) / n_members;
    return n_members == 2 ? rows : some > part ? some : part;
}

size_t tr_cuda_peer_slots(int n_members, int d, int rows)
{
    if (n_members < 2 || n_members > TR_MAX_PEERS || d < 1 || rows < 1) return 0;
    return (size_t)BUFFERS * (size_t)(n_members * rows_in(n_members, rows) + rows) * 4 * (size_t)d;
}

int tr_cuda_peer_rows(const tr_cuda_peer_group *g, tr_cuda_peer_form form)
{
    if (g->n_members == 2) return form == TR_CUDA_PEER_ONE ? g->rows : 0;
    return form == TR_CUDA_PEER_TWO || g->rows < ONE_ROWS ? g->rows : ONE_ROWS;
}

cudaError_t tr_cuda_peer_load(tr_cuda_peer_group *g)
{
    g->at_once[0] = g->at_once[1] = 1;
    return cudaSuccess;
}

typedef struct launch {
    const tr_cuda_peer_group *g;
    const struct tr_norm_args *a;
    size_t row; /* numbers of a slot */
    uint32_t buffer;
    bool left;
} launch;

static volatile uint32_t *slot(const launch *l, int of, size_t i)
{
    return (volatile uint32_t *)(void *)l->g->slots[of] + i * l->row;
}

static volatile uint32_t *in(const launch *l, int of, int sender, int i)
{
    const size_t rows = (size_t)rows_in(l->g->n_members, l->g->rows);
    return slot(l, of,
                ((size_t)l->buffer * (size_t)l->g->n_members + (size_t)sender) * rows + (size_t)i);
}

static volatile uint32_t *out(const launch *l, int of, int i)
{
    const size_t rows = (size_t)rows_in(l->g->n_members, l->g->rows);
    return slot(l, of,
                (size_t)BUFFERS * (size_t)l->g->n_members * rows +
                    (size_t)l->buffer * (size_t)l->g->rows + (size_t)i);
}

static uint32_t bits_of(float x)
{
    uint32_t b;
    memcpy(&b, &x, sizeof b);
    return b == UINT32_MAX ? 0x7fc00000u : b;
}

static float number_of(uint32_t b)
{
    float x;
    memcpy(&x, &b, sizeof x);
    return x;
}

static void put(const launch *l, volatile uint32_t *to, const float *x)
{
    const uint32_t change = fake_told("damaged");

    for (int j = 0; j < l->a->d; j++)
        to[j] = bits_of(x[j]) ^ change;
}

/* Waits for a row, adds it or makes it the sum, and clears its slot. */
static void take(launch *l, volatile uint32_t *from, bool adds, float *sum)
{
    for (int j = 0; j < l->a->d; j++) {
        uint32_t b;
        while ((b = from[j]) == UINT32_MAX && !l->left) {
            int flag;
            MPI_Iprobe(MPI_ANY_SOURCE, MPI_ANY_TAG, MPI_COMM_SELF, &flag, MPI_STATUS_IGNORE);
            sched_yield();
            l->left = *l->g->abort != 0;
        }
        sum[j] = adds ? sum[j] + number_of(b) : number_of(b);
        from[j] = UINT32_MAX;
    }
}

static void add_up(launch *l, int i, const float *mine, float *sum)
{
    for (int m = 0; m < l->g->n_members; m++)
        if (m != l->g->rank)
            take(l, in(l, l->g->rank, m, i), m > 0, sum);
        else
            for (int j = 0; j < l->a->d; j++)
                sum[j] = m ? sum[j] + number_of(bits_of(mine[j])) : number_of(bits_of(mine[j]));
}

/* Everything that is to be sent goes first; `sums` gets [n, d]. */
static void add_rows(launch *l, tr_cuda_peer_form form, int n, float *sums)
{
    const int me = l->g->rank, size = l->g->n_members, d = l->a->d;
    const float *own = l->a->add;

    for (int r = 0; r < n && !l->left; r++)
        for (int m = 0; m < size; m++)
            if (m != me && (form == TR_CUDA_PEER_ONE || m == r % size))
                put(l, in(l, m, me, form == TR_CUDA_PEER_ONE ? r : r / size),
                    own + (size_t)r * l->a->ld_add);
    for (int r = 0; r < n; r++) {
        float *sum = sums + (size_t)r * (size_t)d;
        if (form == TR_CUDA_PEER_TWO && r % size != me) {
            take(l, out(l, me, r), false, sum);
            continue;
        }
        add_up(l, form == TR_CUDA_PEER_ONE ? r : r / size, own + (size_t)r * l->a->ld_add, sum);
        for (int m = 0; m < size && form == TR_CUDA_PEER_TWO && !l->left; m++)
            if (m != me) put(l, out(l, m, r), sum);
    }
}

cudaError_t tr_cuda_peer_norm(const tr_cuda_peer_group *g, tr_cuda_peer_form form,
                              const struct tr_norm_args *a, cudaStream_t stream)
{
    const int n = *a->n < 0 ? 0 : *a->n < a->n_max ? *a->n : a->n_max;
    launch l = {.g = g,
                .a = a,
                .row = (size_t)g->d,
                .buffer = g->words[EPOCH] % BUFFERS,
                .left = g->words[LEFT] != 0};
    struct tr_norm_args whole = *a;

    (void)stream; /* a lane: at once */
    if (a->n_max > tr_cuda_peer_rows(g, form) || a->d > g->d || !a->add)
        return cudaErrorInvalidValue;
    if (n == 0) return cudaSuccess;
    float *sums = malloc((size_t)n * (size_t)a->d * sizeof *sums);
    if (!sums) return cudaErrorMemoryAllocation;
    add_rows(&l, form, n, sums);
    g->words[LEFT] = l.left;
    g->words[EPOCH]++;
    whole.add = sums;
    whole.ld_add = (size_t)a->d;
    const bool well = fake_norm(&whole);
    free(sums);
    return well ? cudaSuccess : cudaErrorInvalidValue;
}
