#include <config.h>

#include "command/bench_pairs.h"

#include <math.h>

#include "base/order.h"

double tr_bench_median(double *x, int n)
{
    tr_sort(x, (size_t)n);
    return n % 2 ? x[n / 2] : (x[n / 2 - 1] + x[n / 2]) / 2;
}

double tr_bench_median_error(const double *x, int n)
{
    return 1.2533 * (x[3 * n / 4] - x[n / 4]) / 1.349 / sqrt(n);
}
