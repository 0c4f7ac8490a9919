/* Who holds which cache page: reference counts, a free list, and the prefix index (prefix.h), which keeps full pages of prompts
 * when nobody holds them any more, for requests that begin with the same tokens, until they are evicted. On the leader only,
 * without a device, tested alone. A page dropped in step n is written again from step n + ring on, because steps in flight may
 * still read it.
 *
 * Pages of the index are held as runs from a prompt's beginning: share, and drop, take them together or from the deepest on. */
#ifndef TR_ENGINE_PAGES_H
#define TR_ENGINE_PAGES_H

#include <stdbool.h>
#include <stdint.h>

typedef struct tr_pages tr_pages;

tr_pages *tr_pages_create(int n_pages, int ring, bool prefix_cache); /* NULL: out of memory */
void tr_pages_free(tr_pages *p);
/* All n pages (each with one reference) or none: 1 or 0. Lowest free ids first. */
int tr_pages_take(tr_pages *p, int n, int32_t *page);
/* One more reference each: of pages that are held, or matched. */
void tr_pages_share(tr_pages *p, const int32_t *page, int n);
/* One less, from the last on. At 0 a page becomes idle when the index has it, free otherwise. */
void tr_pages_drop(tr_pages *p, const int32_t *page, int n, uint64_t step);
/* The step about to be planned: matured pages become free. */
void tr_pages_step(tr_pages *p, uint64_t step);

/* The index's pages with the first n_pages * TR_PAGE_TOKENS ids, as far as there are any. Takes no references: they are good
 * until the next call that is no question. */
int tr_pages_match(const tr_pages *p, const int32_t *token, int n_pages, int32_t *page);
/* Only how many there are. */
int tr_pages_known(const tr_pages *p, const int32_t *token, int n_pages);
/* page[i] of a held run, whose rows are known to be written and trusted, goes into the index. False: it is not and will not
 * be in it, nor can a later page of this run be (others have the same tokens in another page). */
bool tr_pages_enter(tr_pages *p, const int32_t *page, int i, const int32_t *token);
/* Pages whose contents are in doubt: nobody finds them any more. */
void tr_pages_distrust(tr_pages *p, const int32_t *page, int n);
/* Up to n idle pages, least recently held first, leave the index and become free (when matured). */
void tr_pages_evict(tr_pages *p, int n);

int tr_pages_available(const tr_pages *p); /* can be taken now */
int tr_pages_held(const tr_pages *p);      /* with references */
int tr_pages_idle(const tr_pages *p);      /* in the index, without references */
int tr_pages_aging(const tr_pages *p);     /* neither; free when steps in flight have ended */
int tr_pages_total(const tr_pages *p);
int tr_pages_references(const tr_pages *p, int32_t page); /* the index has none */
bool tr_pages_indexed(const tr_pages *p, int32_t page);

#endif
