/* What the parts of the fake device have of each other. */
#ifndef TR_TESTS_FAKE_H
#define TR_TESTS_FAKE_H

#include <stdbool.h>

#include "kernels/kernels.h"

/* The CPU's norm, at once. */
bool fake_norm(const struct tr_norm_args *a);

#endif
