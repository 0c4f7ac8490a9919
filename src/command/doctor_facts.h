/* What one rank of a launch finds around itself: plain data, sent between ranks as it is. */
#ifndef TR_COMMAND_DOCTOR_FACTS_H
#define TR_COMMAND_DOCTOR_FACTS_H

#include <stdint.h>

#include "mpi/start.h"

enum { TR_FACTS_CPUS = 1024 };

typedef struct tr_facts {
    int32_t rank, world, local_rank, local_size;
    char host[64];
    char version[32], binary[40],
        mpi[128];      /* of trireme, hash of the file that runs, of the MPI library */
    char threads[16];  /* thread level MPI gives */
    char launcher[32]; /* "mpirun", "srun", ...; "" : started bare */
    char protocol[16]; /* "PMIx", "PMI", "": by which it found the others */
    int32_t launched;  /* ranks the launcher has started, by its own account; 0: unknown */
    int32_t n_threads; /* of this rank's team */
    int32_t n_online;  /* CPUs of the host */
    uint64_t cpus[TR_FACTS_CPUS / 64]; /* those this rank may use */
    int32_t n_gpus;                    /* of the host, all or those the environment leaves */
    char uuid[48];                     /* of the one this rank would take; "": none */
    uint64_t memory_bytes;             /* left to this host or job; 0: unknown */
    uint64_t shm_bytes;                /* free in /dev/shm; UINT64_MAX: unknown */
    int64_t seconds_left;              /* of the batch job; -1: not known */
    char job[32];                      /* batch job's id; "": none */
    char network[128];                 /* HCAs, and what the environment says of transports */
    int32_t single_copy; /* 1: ranks of a host may read each other's memory (CMA), 0: not */
    int32_t sees_out;    /* 1: OUT's folder is the one rank 0 sees, 0: it is not, -1: not asked */
} tr_facts;

/* Main thread, after tr_world_start. Never fails: what cannot be found is left unknown. */
void tr_facts_find(tr_facts *f, const tr_world *world);

int tr_facts_n_cpus(const tr_facts *f);

/* n_gpus and uuid, by the driver's own files in `root`, so that no context is made on any GPU: those whose device file in `dev`
 * this process may open, and of these the ones that CUDA_VISIBLE_DEVICES (`visible`; NULL: not set) leaves. */
void tr_facts_gpus(tr_facts *f, const char *root, const char *dev, const char *visible);

#endif
