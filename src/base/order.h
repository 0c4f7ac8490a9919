/* Measured numbers in order. */
#ifndef TR_BASE_ORDER_H
#define TR_BASE_ORDER_H

#include <stddef.h>

/* Ascending, in place; none of them is a NaN. */
void tr_sort(double *x, size_t n);
/* Of n > 0 numbers, which it sorts: the one in the middle, of two the larger (a time that was measured, not one between). */
double tr_median(double *x, int n);

#endif
