#include <config.h>

#include "base/order.h"

#include <stdlib.h>

static int ascending(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

void tr_sort(double *x, size_t n)
{
    qsort(x, n, sizeof *x, ascending);
}

double tr_median(double *x, int n)
{
    tr_sort(x, (size_t)n);
    return x[n / 2];
}
