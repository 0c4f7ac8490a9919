/* What benches say of pairs of blocks, one with a thing and one without: bench_profile.c, bench_watchdog.c. Pure. */
#ifndef TR_COMMAND_BENCH_PAIRS_H
#define TR_COMMAND_BENCH_PAIRS_H

/* Of n numbers, n >= 1, which it leaves in ascending order. */
double tr_bench_median(double *x, int n);
/* The standard error of the median of n numbers in ascending order: 1.2533 s / sqrt(n), s being the quartiles' distance over 1.349, as
 * for a normal distribution; a pair that something else disturbed counts once. */
double tr_bench_median_error(const double *x, int n);

#endif
