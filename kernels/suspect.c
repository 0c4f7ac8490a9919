#include <config.h>

#include "kernels/suspect.h"

#include <dlfcn.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* ---- what a number means ------------------------------------------------------------------------------------------- */

typedef struct xid_entry {
    int xid;
    tr_verdict verdict;
    const char *meaning;
} xid_entry;

/* NVIDIA's documentation "XID Errors". Those that a wrong kernel can cause say nothing about the hardware. */
/* clang-format off */
static const xid_entry xids[] = {
    {13, TR_VERDICT_PERHAPS, "graphics engine exception"},
    {31, TR_VERDICT_PERHAPS, "memory page fault"},
    {32, TR_VERDICT_PERHAPS, "corrupted push buffer"},
    {43, TR_VERDICT_PERHAPS, "the GPU stopped processing"},
    {45, TR_VERDICT_PERHAPS, "preemptive cleanup after an earlier error"},
    {46, TR_VERDICT_HARDWARE, "the GPU stopped responding"},
    {48, TR_VERDICT_HARDWARE, "double-bit ECC error"},
    {62, TR_VERDICT_HARDWARE, "halt of the internal microcontroller"},
    {63, TR_VERDICT_HARDWARE, "a row of memory is to be remapped"},
    {64, TR_VERDICT_HARDWARE, "a row of memory could not be remapped"},
    {74, TR_VERDICT_HARDWARE, "NVLink error"},
    {79, TR_VERDICT_HARDWARE, "the GPU has fallen off the bus"},
    {92, TR_VERDICT_HARDWARE, "many single-bit ECC errors"},
    {94, TR_VERDICT_HARDWARE, "contained ECC error"},
    {95, TR_VERDICT_HARDWARE, "uncontained ECC error"},
    {119, TR_VERDICT_HARDWARE, "the GPU's system processor does not answer"},
    {120, TR_VERDICT_HARDWARE, "error of the GPU's system processor"},
    {140, TR_VERDICT_HARDWARE, "unrecovered ECC error"},
};
/* clang-format on */

static const xid_entry *find_xid(int xid)
{
    for (size_t i = 0; i < sizeof xids / sizeof *xids; i++)
        if (xids[i].xid == xid) return &xids[i];
    return NULL;
}

const char *tr_xid_meaning(int xid)
{
    const xid_entry *e = find_xid(xid);
    return e ? e->meaning : "";
}

tr_verdict tr_xid_verdict(int xid)
{
    const xid_entry *e = find_xid(xid);
    if (e) return e->verdict;
    return xid > 0 ? TR_VERDICT_PERHAPS : TR_VERDICT_NONE;
}

/* ---- listening ----------------------------------------------------------------------------------------------------- */

/* The part of NVML that is used, as its documentation has it; the ABI is stable by the numbers behind the names. */
typedef struct nvml_device *device_t;
typedef struct nvml_event_set *set_t;
typedef struct nvml_event { /* nvmlEventData_t of nvmlEventSetWait_v2 */
    device_t device;
    unsigned long long type, data; /* data: the Xid */
    unsigned gpu_instance, compute_instance;
} nvml_event;
enum { EVENT_XID = 8, RESULT_GPU_IS_LOST = 15 };

struct tr_suspect {
    void *library;
    set_t set;
    int (*shutdown)(void);
    int (*set_free)(set_t);
    int (*wait)(set_t, nvml_event *, unsigned);
};

/* dlsym gives an object pointer; POSIX says that a function's address survives this way. */
static void find(const tr_suspect *s, const char *name, void *out)
{
    void *p = dlsym(s->library, name);
    memcpy(out, &p, sizeof p);
}

static bool listen_to(tr_suspect *s, const char *pci)
{
    int (*init)(void), (*by_pci)(const char *, device_t *), (*set_create)(set_t *),
        (*add)(device_t, unsigned long long, set_t);
    device_t device = NULL;

    find(s, "nvmlInit_v2", &init);
    find(s, "nvmlDeviceGetHandleByPciBusId_v2", &by_pci);
    find(s, "nvmlEventSetCreate", &set_create);
    find(s, "nvmlDeviceRegisterEvents", &add);
    find(s, "nvmlEventSetWait_v2", &s->wait);
    find(s, "nvmlEventSetFree", &s->set_free);
    find(s, "nvmlShutdown", &s->shutdown);
    if (!init || !by_pci || !set_create || !add || !s->wait || !s->set_free || !s->shutdown ||
        init() != 0) {
        s->shutdown = NULL; /* there is nothing to shut down */
        return false;
    }
    if (by_pci(pci, &device) != 0) return false;
    if (set_create(&s->set) != 0) {
        s->set = NULL;
        return false;
    }
    return add(device, EVENT_XID, s->set) == 0;
}

tr_suspect *tr_suspect_open(const char *pci)
{
    tr_suspect *s = calloc(1, sizeof *s);

    if (!s) return NULL;
    s->library = dlopen("libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL);
    if (s->library && listen_to(s, pci)) return s;
    tr_suspect_close(s);
    return NULL;
}

tr_heard tr_suspect_hear(tr_suspect *s, int wait_ms)
{
    enum {
        EVENTS_MAX = 1000
    }; /* a driver that reports without end is not listened to without end */
    tr_heard heard = {.listens = s != NULL};
    int result = 0;

    for (int i = 0; s && i < EVENTS_MAX && result == 0; i++) {
        nvml_event event = {0};
        result = s->wait(s->set, &event, i == 0 && wait_ms > 0 ? (unsigned)wait_ms : 0);
        if (result != 0 || event.type != EVENT_XID || event.data == 0 || event.data > INT_MAX)
            continue;
        if (tr_xid_verdict((int)event.data) > tr_xid_verdict(heard.xid))
            heard.xid = (int)event.data;
    }
    heard.lost = result == RESULT_GPU_IS_LOST;
    return heard;
}

void tr_suspect_close(tr_suspect *s)
{
    if (!s) return;
    if (s->set) s->set_free(s->set);
    if (s->shutdown) s->shutdown();
    if (s->library) dlclose(s->library);
    free(s);
}

/* ---- the sentence -------------------------------------------------------------------------------------------------- */

static void heard_text(char *out, size_t size, const tr_heard *heard)
{
    const char *meaning = tr_xid_meaning(heard->xid);

    if (heard->xid)
        snprintf(out, size, "Xid %d%s%s%s", heard->xid, *meaning ? ": " : "", meaning,
                 heard->lost ? ", and the driver has lost the GPU" : "");
    else if (heard->lost)
        snprintf(out, size, "the driver has lost the GPU");
    else
        snprintf(out, size, heard->listens ? "the driver reported no Xid" : "Xid unknown, no NVML");
}

void tr_suspect_text(char *out, size_t size, const tr_suspect_facts *f)
{
    char heard[160], advice[400];
    tr_verdict verdict = f->verdict;

    if (tr_xid_verdict(f->heard.xid) > verdict) verdict = tr_xid_verdict(f->heard.xid);
    if (f->heard.lost) verdict = TR_VERDICT_HARDWARE;
    if (verdict == TR_VERDICT_NONE) {
        snprintf(out, size, "%s%son %s", f->uuid, *f->uuid ? ", " : "", f->host);
        return;
    }
    heard_text(heard, sizeof heard, &f->heard);
    if (verdict == TR_VERDICT_HARDWARE && f->in_slurm)
        snprintf(advice, sizeof advice, "this GPU is suspect: submit again with --exclude=%s",
                 f->host);
    else if (verdict == TR_VERDICT_HARDWARE)
        snprintf(advice, sizeof advice, "this GPU is suspect: run elsewhere until it is checked");
    else
        snprintf(advice, sizeof advice, "if this comes on one host alone, its GPU is suspect%s%s",
                 f->in_slurm ? ": --exclude=" : "", f->in_slurm ? f->host : "");
    snprintf(out, size, "%s%son %s; %s; %s", f->uuid, *f->uuid ? ", " : "", f->host, heard, advice);
}

void tr_suspect_host(char *out, size_t size, bool *in_slurm)
{
    const char *job = getenv("SLURM_JOB_ID"), *node = getenv("SLURMD_NODENAME");

    *in_slurm = job && *job;
    if (*in_slurm && node && *node) {
        snprintf(out, size, "%s", node);
        return;
    }
    if (gethostname(out, size) != 0) snprintf(out, size, "this host");
    out[size - 1] = '\0';
}
