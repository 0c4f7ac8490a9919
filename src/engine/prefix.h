/* The prefix index: which page holds the rows of which tokens behind which others. A tree of full pages, one node per page,
 * found by a chained hash of the token ids; a find compares the ids themselves, so equal hashes never give a wrong page.
 *
 * A node is busy (somebody holds its page) or idle. Who holds a page holds those before it too, and gives them back deepest
 * first; so an idle node's children are idle and were so before it: the page idle for longest is always a leaf. Knows no
 * references and no steps; belongs to tr_pages (pages.c), which tells it of both. On the leader only, tested alone. */
#ifndef TR_ENGINE_PREFIX_H
#define TR_ENGINE_PREFIX_H

#include <stdbool.h>
#include <stdint.h>

typedef struct tr_prefix tr_prefix;

tr_prefix *tr_prefix_create(int n_pages); /* NULL: out of memory */
void tr_prefix_free(tr_prefix *x);
/* The page with these TR_PAGE_TOKENS ids behind those of parent (-1: at position 0), or -1. */
int32_t tr_prefix_find(const tr_prefix *x, int32_t parent, const int32_t *token);
/* A busy page comes in. False: these tokens have a page already, or the parent cannot be found itself. */
bool tr_prefix_enter(tr_prefix *x, int32_t parent, const int32_t *token, int32_t page);
bool tr_prefix_has(const tr_prefix *x, int32_t page); /* has a node, found or not */
/* The page, and with it those behind it, is never found again; it stays a node until it is evicted. */
void tr_prefix_distrust(tr_prefix *x, int32_t page);
void tr_prefix_idle(tr_prefix *x, int32_t page); /* of a busy node; its children are idle */
void tr_prefix_busy(tr_prefix *x,
                    int32_t page); /* of an idle node; its parent is or becomes busy */
/* Takes out the page that has been idle for longest, a leaf; -1: none is idle. */
int32_t tr_prefix_evict(tr_prefix *x);
int tr_prefix_n_idle(const tr_prefix *x);

#endif
