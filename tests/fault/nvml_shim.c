/* libnvidia-ml.so.1 with one GPU, at the address of cuda_shim.c's; only what the program needs to hear of the driver's errors.
 *
 *   NVML_SHIM_XID=N,M,...   these errors are reported, in this order, when the program waits for one
 *   NVML_SHIM_RESULT=R      ... and then the wait ends with R (default 10, a timeout)
 *   NVML_SHIM_REFUSE=1      this GPU cannot report errors
 */
#include <config.h>

#include <stdlib.h>
#include <string.h>

typedef struct shim_event { /* nvmlEventData_t */
    void *device;
    unsigned long long type, data;
    unsigned gpu_instance, compute_instance;
} shim_event;

enum { SUCCESS = 0, NOT_SUPPORTED = 3, NOT_FOUND = 6, TIMEOUT = 10, EVENT_XID = 8 };

static char gpu, set;  /* their addresses are the handles */
static size_t n_given; /* bytes of NVML_SHIM_XID that have been reported */

int nvmlInit_v2(void);
int nvmlShutdown(void);
int nvmlDeviceGetHandleByPciBusId_v2(const char *pci, void **out);
int nvmlEventSetCreate(void **out);
int nvmlEventSetFree(void *events);
int nvmlDeviceRegisterEvents(void *device, unsigned long long types, void *events);
int nvmlEventSetWait_v2(void *events, shim_event *out, unsigned timeout_ms);

int nvmlInit_v2(void)
{
    return SUCCESS;
}

int nvmlShutdown(void)
{
    return SUCCESS;
}

int nvmlDeviceGetHandleByPciBusId_v2(const char *pci, void **out)
{
    *out = &gpu;
    return strcmp(pci, "0000:1B:00.0") == 0 ? SUCCESS : NOT_FOUND;
}

int nvmlEventSetCreate(void **out)
{
    *out = &set;
    return SUCCESS;
}

int nvmlEventSetFree(void *events)
{
    return events == &set ? SUCCESS : NOT_FOUND;
}

int nvmlDeviceRegisterEvents(void *device, unsigned long long types, void *events)
{
    if (getenv("NVML_SHIM_REFUSE")) return NOT_SUPPORTED;
    return device == &gpu && types == EVENT_XID && events == &set ? SUCCESS : NOT_FOUND;
}

int nvmlEventSetWait_v2(void *events, shim_event *out, unsigned timeout_ms)
{
    const char *xids = getenv("NVML_SHIM_XID"), *result = getenv("NVML_SHIM_RESULT");
    char *end = NULL;

    (void)events, (void)timeout_ms;
    if (!xids || n_given >= strlen(xids)) return result ? atoi(result) : TIMEOUT;
    *out =
        (shim_event){.device = &gpu, .type = EVENT_XID, .data = strtoull(xids + n_given, &end, 10)};
    n_given = (size_t)(end - xids) + (*end == ',');
    return SUCCESS;
}
