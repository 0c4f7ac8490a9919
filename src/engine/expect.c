#include <config.h>

#include "engine/expect.h"

static const double weight = 0.2, most = 4;

static int size_of(int64_t n_rows)
{
    const int i = n_rows > 1 ? 63 - __builtin_clzll((unsigned long long)n_rows) : 0;
    return i < TR_EXPECT_SIZES ? i : TR_EXPECT_SIZES - 1;
}

void tr_expect_seen(tr_expect *x, int64_t n_rows, double seconds)
{
    double *mean = &x->step_s[size_of(n_rows)];

    if (!(seconds > 0)) return;
    if (*mean > 0 && seconds > most * *mean) seconds = most * *mean;
    *mean = *mean > 0 ? *mean + weight * (seconds - *mean) : seconds;
}

double tr_expect_step(const tr_expect *x, int64_t n_rows)
{
    const int size = size_of(n_rows);

    for (int i = size; i < TR_EXPECT_SIZES; i++)
        if (x->step_s[i] > 0) return x->step_s[i];
    for (int i = size; i >= 0; i--)
        if (x->step_s[i] > 0)
            return x->step_s[i] *
                   (double)(INT64_C(2) << (size - i)); /* at most so many rows more */
    return 0;
}
