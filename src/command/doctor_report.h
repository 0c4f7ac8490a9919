/* From what the ranks have found to one page: what is there, what must be changed before a big job, and what is worth knowing.
 * Pure, so that launches nobody has at hand can be tested. */
#ifndef TR_COMMAND_DOCTOR_REPORT_H
#define TR_COMMAND_DOCTOR_REPORT_H

#include <stdio.h>

#include "command/doctor_facts.h"
#include "command/doctor_files.h"

/* What a message takes between two ranks; 0: not measured. */
typedef struct tr_link {
    int from, to; /* ranks */
    double latency_s, bytes_per_s;
} tr_link;

typedef struct tr_doctor {
    const tr_facts *rank; /* [n], in order */
    int n;
    const tr_out_facts *out;
    const tr_link *link;
    int n_links;
    const char *
        nccl; /* version of the library that ranks with GPUs would use; NULL: this build has none */
    bool time_given; /* the user knows the limit: --time-budget */
} tr_doctor;

/* The page; returns how many things must be changed. */
int tr_doctor_report(const tr_doctor *d, FILE *out);

#endif
