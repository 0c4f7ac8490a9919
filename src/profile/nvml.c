#include <config.h>

#include "profile/nvml.h"

#include <dlfcn.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* The part of NVML that is used, as its documentation has it; the ABI is stable by the numbers behind the names. */
typedef struct nvml_device *device_t;
typedef struct nvml_memory {
    unsigned long long total, free, used;
} nvml_memory;
typedef struct nvml_utilization {
    unsigned gpu, memory; /* per cent of the last sampling period */
} nvml_utilization;
typedef struct nvml_pci { /* nvmlPciInfo_t, version 3 */
    char legacy[16];
    unsigned domain, bus, device, device_id, subsystem_id;
    char bus_id[32];
} nvml_pci;
enum { CLOCK_SM = 1, CLOCK_MEMORY = 2, TEMPERATURE_GPU = 0 };

enum { POWER, SM_CLOCK, MEMORY_CLOCK, MEMORY_USED, GPU_LOAD, MEMORY_LOAD, TEMPERATURE, COUNTERS };

/* clang-format off */
static const char *const names[COUNTERS] = {"power", "sm_clock", "memory_clock", "memory_used", "gpu_load", "memory_load",
                                            "temperature"};
static const char *const units[COUNTERS] = {"W", "Hz", "Hz", "bytes", "1", "1", "degC"};
/* clang-format on */

struct tr_nvml {
    void *library;
    device_t device;
    int (*shutdown)(void);
    const char *(*error_string)(int);
    int (*power)(device_t, unsigned *);
    int (*clock)(device_t, unsigned, unsigned *);
    int (*memory)(device_t, nvml_memory *);
    int (*load)(device_t, nvml_utilization *);
    int (*temperature)(device_t, unsigned, unsigned *);
    int (*uuid)(device_t, char *, unsigned);
    int (*pci)(device_t, nvml_pci *);
    int (*driver)(char *, unsigned);
    char why[COUNTERS][96];
    const char *absent[COUNTERS];
};

/* dlsym gives an object pointer; POSIX says that a function's address survives this way. */
static void find(const tr_nvml *n, const char *name, void *out)
{
    void *p = dlsym(n->library, name);
    memcpy(out, &p, sizeof p);
}

static int read_one(tr_nvml *n, int i, double *value)
{
    enum { MISSING = 13 }; /* NVML_ERROR_FUNCTION_NOT_FOUND */
    nvml_memory memory = {0};
    nvml_utilization load = {0};
    unsigned x = 0;
    int result = MISSING;

    switch (i) {
    case POWER:
        if (n->power) result = n->power(n->device, &x);
        *value = x * 1e-3;
        break;
    case SM_CLOCK:
    case MEMORY_CLOCK:
        if (n->clock) result = n->clock(n->device, i == SM_CLOCK ? CLOCK_SM : CLOCK_MEMORY, &x);
        *value = x * 1e6;
        break;
    case MEMORY_USED:
        if (n->memory) result = n->memory(n->device, &memory);
        *value = (double)memory.used;
        break;
    case GPU_LOAD:
    case MEMORY_LOAD:
        if (n->load) result = n->load(n->device, &load);
        *value = (i == GPU_LOAD ? load.gpu : load.memory) * 1e-2;
        break;
    default:
        if (n->temperature) result = n->temperature(n->device, TEMPERATURE_GPU, &x);
        *value = x;
        break;
    }
    return result;
}

static void read_all(void *ctx, double *values)
{
    tr_nvml *n = ctx;
    for (int i = 0; i < COUNTERS; i++)
        if (n->absent[i] || read_one(n, i, &values[i]) != 0) values[i] = (double)NAN;
}

/* "2,GPU-8a3f...,0": the i-th. False: there is none, or nothing is said. */
static bool visible(int i, char *out, size_t size)
{
    const char *s = getenv("CUDA_VISIBLE_DEVICES");
    int n = 0;

    if (!s || !*s) return false;
    for (const char *p = s; p; p = strchr(p, ','), p = p ? p + 1 : NULL)
        n++;
    for (int at = i % n; at > 0; at--)
        s = strchr(s, ',') + 1;
    const size_t length = strcspn(s, ",");
    if (length == 0 || length >= size) return false;
    memcpy(out, s, length);
    out[length] = '\0';
    return true;
}

static bool find_device(tr_nvml *n, int i)
{
    int (*by_index)(unsigned, device_t *), (*by_uuid)(const char *, device_t *),
        (*count)(unsigned *);
    unsigned devices = 0;
    char name[96], *end = name;

    find(n, "nvmlDeviceGetHandleByIndex_v2", &by_index);
    find(n, "nvmlDeviceGetHandleByUUID", &by_uuid);
    find(n, "nvmlDeviceGetCount_v2", &count);
    if (!by_index || !count || count(&devices) != 0 || !devices) return false;
    if (!visible(i, name, sizeof name)) return by_index((unsigned)i % devices, &n->device) == 0;
    const long number = strtol(name, &end, 10);
    if (!*end && number >= 0) return by_index((unsigned)number, &n->device) == 0;
    return by_uuid && by_uuid(name, &n->device) == 0;
}

static void find_functions(tr_nvml *n)
{
    find(n, "nvmlErrorString", &n->error_string);
    find(n, "nvmlDeviceGetPowerUsage", &n->power);
    find(n, "nvmlDeviceGetClockInfo", &n->clock);
    find(n, "nvmlDeviceGetMemoryInfo", &n->memory);
    find(n, "nvmlDeviceGetUtilizationRates", &n->load);
    find(n, "nvmlDeviceGetTemperature", &n->temperature);
    find(n, "nvmlDeviceGetUUID", &n->uuid);
    find(n, "nvmlDeviceGetPciInfo_v3", &n->pci);
    find(n, "nvmlSystemGetDriverVersion", &n->driver);
}

tr_nvml *tr_nvml_open(int i_device)
{
    int (*init)(void) = NULL;
    double unused;
    tr_nvml *n = calloc(1, sizeof *n);

    if (!n) return NULL;
    n->library = dlopen("libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL);
    if (n->library) {
        find(n, "nvmlInit_v2", &init);
        find(n, "nvmlShutdown", &n->shutdown);
    }
    if (!init || init() != 0) n->shutdown = NULL;
    if (!n->shutdown || i_device < 0 || !find_device(n, i_device)) {
        tr_nvml_close(n);
        return NULL;
    }
    find_functions(n);
    for (int i = 0; i < COUNTERS; i++) {
        const int result = read_one(n, i, &unused);
        if (result == 0) continue;
        snprintf(n->why[i], sizeof n->why[i], "NVML: %s",
                 n->error_string ? n->error_string(result) : "no reason given");
        n->absent[i] = n->why[i];
    }
    return n;
}

void tr_nvml_identity(const tr_nvml *n, char *uuid, char *pci)
{
    char text[96] = "";
    nvml_pci info = {.bus_id = ""};

    uuid[0] = pci[0] = '\0';
    if (!n) return;
    if (n->uuid && n->uuid(n->device, text, sizeof text) == 0) snprintf(uuid, 41, "%.40s", text);
    if (n->pci && n->pci(n->device, &info) == 0)
        snprintf(pci, 16, "%04x:%02x:%02x.0", info.domain & 0xffff, info.bus & 0xff,
                 info.device & 0xff);
}

void tr_nvml_driver(const tr_nvml *n, char *driver)
{
    enum { BYTES = 80 }; /* NVML_SYSTEM_DRIVER_VERSION_BUFFER_SIZE */

    if (!n || !n->driver || n->driver(driver, BYTES) != 0) driver[0] = '\0';
}

tr_profile_counters tr_nvml_counters(tr_nvml *n)
{
    return (tr_profile_counters){.source = "nvml",
                                 .n = COUNTERS,
                                 .name = names,
                                 .units = units,
                                 .absent = n->absent,
                                 .ctx = n,
                                 .read = read_all};
}

void tr_nvml_close(tr_nvml *n)
{
    if (!n) return;
    if (n->shutdown) n->shutdown();
    if (n->library) dlclose(n->library);
    free(n);
}
