/* The panels of one product (packed.h) as the members of a team come for them. Cores are not equally fast at every moment:
 * where each had its share and no more, one of two waited for the other for a third of a decode step's products (BENCHMARKS,
 * "cores that are not equally fast"). A member begins with its own share, whose memory first touch has put near it, and goes
 * on with what the others have left.
 *
 *     for (int i = 0, begin, end; tr_piece(p, i, &begin, &end); i++)
 *         ...                                   panels [begin, end)
 *
 * The first such loop of a member takes pieces until there are none; every later one meets the same pieces again: a product
 * that goes through k in several passes makes a piece's sums alone, in order. Which member makes a piece changes no number. */
#ifndef TR_KERNELS_CPU_PIECES_H
#define TR_KERNELS_CPU_PIECES_H

#include <stddef.h>
#include <stdint.h>

#include "kernels/cpu/team.h"

enum {
    TR_PIECES_MAX = 1024, /* of a product */
    /* A piece has a multiple of so many, but for the last of a share: products take 4 at a time. */
    TR_PIECE_PANELS = 4,
    TR_PIECE_BYTES = 1 << 16, /* at least, about: asking for one costs up to 0.1 us */
    /* Products of more rows are cut once: they go through k in so many passes that who comes first would take all pieces in
     * the first of them. */
    TR_PIECES_ROWS = 32,
};

typedef struct tr_pieces { /* of one member and product; on its stack */
    tr_team *team;         /* NULL: mine are all */
    int counter; /* of share 0: counter + s counts the pieces of share s that somebody has */
    int n_panels, n_shares;
    int size;         /* panels of a piece */
    int share, tried; /* where to ask next; shares that had none left */
    int offset;       /* is added to begin and end: a second product of the same pieces */
    int n_mine;
    struct {
        int begin, end;
    } mine[TR_PIECES_MAX];
} tr_pieces;

/* Whether it pays to take from others. Of a share of a piece or two nothing is left when somebody comes, but asking every other
 * member costs as much as the product (models/tiny on 16 threads: half a step more). */
static inline int tr_pieces_pay(int n_rows, size_t share_bytes)
{
    return n_rows <= TR_PIECES_ROWS && share_bytes >= 2 * TR_PIECE_BYTES;
}

/* One piece, nobody else's. */
static inline void tr_pieces_own(tr_pieces *p, int begin, int end)
{
    p->team = NULL;
    p->n_shares = p->tried = p->offset = 0;
    p->n_mine = begin < end;
    p->mine[0].begin = begin;
    p->mine[0].end = end;
}

/* n_panels in n_shares, of which this member asks for those of `share` first. Inside a run of several members, each with the
 * same arguments but for share; n_shares <= TR_PIECES_MAX, counters [counter, counter + n_shares) are asked for nothing else in
 * this run. panel_bytes: what there is to read of a panel. */
static inline void tr_pieces_shared(tr_pieces *p, tr_team *team, int counter, int n_panels,
                                    int n_shares, int share, size_t panel_bytes)
{
    const int most = (n_panels + n_shares - 1) / n_shares, each = TR_PIECES_MAX / n_shares;
    const size_t panels = panel_bytes > 0 ? TR_PIECE_BYTES / panel_bytes : 0;
    int size = (most + each - 1) / each;

    if ((size_t)size < panels) size = (int)panels;
    p->team = team;
    p->counter = counter;
    p->n_panels = n_panels;
    p->n_shares = n_shares;
    p->size = size < 1 ? TR_PIECE_PANELS
                       : (size + TR_PIECE_PANELS - 1) / TR_PIECE_PANELS * TR_PIECE_PANELS;
    p->share = share;
    p->tried = p->offset = p->n_mine = 0;
}

/* One more for this member. 0: none is left. */
static inline int tr_pieces_take(tr_pieces *p)
{
    for (; p->tried < p->n_shares; p->tried++) {
        const int begin = tr_team_part(p->n_panels, p->share, p->n_shares);
        const int end = tr_team_part(p->n_panels, p->share + 1, p->n_shares);
        const int n = (end - begin + p->size - 1) / p->size;
        const int at = tr_team_count(p->team, p->counter + p->share, n);
        if (at < n) {
            p->mine[p->n_mine].begin = begin + at * p->size;
            p->mine[p->n_mine++].end = at + 1 < n ? begin + (at + 1) * p->size : end;
            return 1;
        }
        p->share = p->share + 1 < p->n_shares ? p->share + 1 : 0;
    }
    return 0;
}

/* Piece i of this member, 0 <= i <= those that it has met. 0: it has no more. */
static inline int tr_piece(tr_pieces *p, int i, int *begin, int *end)
{
    if (i == p->n_mine && !tr_pieces_take(p)) return 0;
    *begin = p->mine[i].begin + p->offset;
    *end = p->mine[i].end + p->offset;
    return 1;
}

#endif
