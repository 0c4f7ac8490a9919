/* How fast this machine is, for limits of processor time that were set on another one. */
#ifndef TR_TESTS_MACHINE_H
#define TR_TESTS_MACHINE_H

#include <stdint.h>
#include <time.h>

/* A limit of so many seconds, on this machine: longer where fixed work takes longer than on the one where limits were set. There
 * (a virtual machine with 2 cores of a Xeon that has AMX, gcc 12 -O2) 32 M steps of FNV-1a take 0.04 s. Never shorter. */
static inline double tr_machine_seconds(double seconds)
{
    const double there = 0.04;
    volatile uint64_t result;
    double least = 1e9;

    for (int i = 0; i < 3; i++) {
        const clock_t begin = clock();
        uint64_t h = UINT64_C(14695981039346656037);
        for (uint32_t k = 0; k < 32u << 20; k++)
            h = (h ^ (k & 255)) * UINT64_C(1099511628211);
        result = h;
        (void)result;
        const double took = (double)(clock() - begin) / CLOCKS_PER_SEC;
        if (took < least) least = took;
    }
    return least > there ? seconds * (least / there) : seconds;
}

#endif
