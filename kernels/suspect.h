/* A GPU that has failed: what the driver reported of it (Xid, by NVML's events), what that means, and the sentence that tells
 * the user which GPU of which host it is and whether to keep away from it (reliability.md 4, row 18). NVML is opened when it
 * is there (libnvidia-ml.so.1; nothing of it is needed to build). Host code without CUDA: a backend owns one per GPU. */
#ifndef TR_KERNELS_SUSPECT_H
#define TR_KERNELS_SUSPECT_H

#include <stdbool.h>
#include <stddef.h>

typedef enum tr_verdict {
    TR_VERDICT_NONE,     /* a refusal: says nothing about the device */
    TR_VERDICT_PERHAPS,  /* the context is lost: a fault of the program, or of the device */
    TR_VERDICT_HARDWARE, /* the device itself */
} tr_verdict;

/* What was heard of a GPU. */
typedef struct tr_heard {
    bool listens; /* NVML is there, and reports errors of this GPU */
    bool lost;    /* the driver does not find the GPU any more */
    int xid;      /* the gravest that was reported, the first one of equals; 0: none */
} tr_heard;

/* The driver's number for an error, in words; "" for one that is not known here. */
const char *tr_xid_meaning(int xid);
tr_verdict tr_xid_verdict(int xid);

typedef struct tr_suspect tr_suspect;

/* Listens from now on for errors of the GPU at the PCI address `pci` ("0000:1b:00.0"): only what happens later is heard.
 * NULL: no NVML here, it does not report errors of this GPU, or out of memory. */
tr_suspect *tr_suspect_open(const char *pci);
/* What has happened since; waits up to `wait_ms` for the first report, as the driver may still be about to make it. NULL is
 * allowed. One thread at a time. */
tr_heard tr_suspect_hear(tr_suspect *suspect, int wait_ms);
void tr_suspect_close(tr_suspect *suspect);

typedef struct tr_suspect_facts {
    const char *uuid; /* "GPU-...", or "" */
    const char *host; /* as the batch system calls it where there is one */
    bool in_slurm;
    tr_verdict verdict; /* by CUDA's error alone */
    tr_heard heard;
} tr_suspect_facts;

/* "GPU-..., on node07; Xid 48: ...; this GPU is suspect: ... --exclude=node07", one line. Cut where it does not fit. */
void tr_suspect_text(char *out, size_t size, const tr_suspect_facts *facts);
/* This host's name as Slurm knows it (SLURMD_NODENAME), else the system's; *in_slurm: this process belongs to a job. */
void tr_suspect_host(char *out, size_t size, bool *in_slurm);

#endif
