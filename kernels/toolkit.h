/* What the kernels of this build were made with, for who tells of it: trireme --version, profiles. Any thread. */
#ifndef TR_KERNELS_TOOLKIT_H
#define TR_KERNELS_TOOLKIT_H

#include <stddef.h>

/* The toolkit of the kernels for GPUs: "13.0"; "" where this build has none. */
void tr_device_toolkit(char *text, size_t n);

#endif
