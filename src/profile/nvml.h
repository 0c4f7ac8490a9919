/* What the driver knows of this rank's GPU: power, clocks, memory, load, temperature, by NVML, which is opened when it is there
 * (libnvidia-ml.so.1; nothing of it is needed to build). Sampled by the profile's thread with its other counters. */
#ifndef TR_PROFILE_NVML_H
#define TR_PROFILE_NVML_H

#include "profile/profile.h"

typedef struct tr_nvml tr_nvml;

/* i_device: the process's GPU i. Which GPU of the node that is, CUDA_VISIBLE_DEVICES says (numbers in PCI order, or UUIDs).
 * NULL: no NVML here, no such GPU, or out of memory. */
tr_nvml *tr_nvml_open(int i_device);
/* uuid[41], pci[16] as /grid/ranks has them. */
void tr_nvml_identity(const tr_nvml *nvml, char *uuid, char *pci);
/* driver[80]: the driver's version, "580.65.06"; "" where it is not told. nvml may be NULL. */
void tr_nvml_driver(const tr_nvml *nvml, char *driver);
/* Valid until close. What the driver does not tell is absent, with its reason. */
tr_profile_counters tr_nvml_counters(tr_nvml *nvml);
void tr_nvml_close(tr_nvml *nvml);

#endif
