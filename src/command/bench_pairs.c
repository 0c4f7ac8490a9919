#include <config.h>

#include "command/bench_pairs.h"

#include <math.h>
#include <stdlib.h>

static int ascending(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

double tr_bench_median(double *x, int n)
{
    qsort(x, (size_t)n, sizeof *x, ascending);
    return n % 2 ? x[n / 2] : (x[n / 2 - 1] + x[n / 2]) / 2;
}

double tr_bench_median_error(const double *x, int n)
{
    return 1.2533 * (x[3 * n / 4] - x[n / 4]) / 1.349 / sqrt(n);
}
