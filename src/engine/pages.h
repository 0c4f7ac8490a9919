/* Who holds which cache page: reference counts and a free list. On the leader only, without a device, tested alone.
 * A page freed in step n is written again from step n + ring on, because steps in flight may still read it. */
#ifndef TR_ENGINE_PAGES_H
#define TR_ENGINE_PAGES_H

#include <stdint.h>

typedef struct tr_pages tr_pages;

tr_pages *tr_pages_create(int n_pages, int ring); /* NULL: out of memory */
void tr_pages_free(tr_pages *p);
/* All n pages (each with one reference) or none: 1 or 0. Lowest free ids first. */
int tr_pages_take(tr_pages *p, int n, int32_t *page);
void tr_pages_share(tr_pages *p, const int32_t *page, int n); /* one more reference each */
void tr_pages_drop(tr_pages *p, const int32_t *page, int n,
                   uint64_t step); /* one less; free at 0 */
void tr_pages_step(tr_pages *p,
                   uint64_t step); /* the step about to be planned: matured pages become free */
int tr_pages_available(const tr_pages *p); /* can be taken now */
int tr_pages_held(const tr_pages *p);      /* with references */
int tr_pages_total(const tr_pages *p);
int tr_pages_references(const tr_pages *p, int32_t page);

#endif
