#include <config.h>

#include "engine/wire.h"

tr_status tr_wire_settle(tr_wire *w, tr_comm *control, tr_err *err)
{
    tr_status st = TR_OK;

    for (int i = 0; i < w->n && st == TR_OK; i++)
        st = tr_comm_wait(control, TR_LANE_MAIN, w->ticket[i], err);
    w->n = 0;
    return st;
}

static tr_status broadcast(tr_wire *w, tr_comm *control, void *data, size_t bytes, tr_err *err)
{
    tr_ticket *ticket = &w->ticket[w->n];
    tr_status st = tr_comm_broadcast(control, 0, data, bytes, ticket, err);

    if (st != TR_OK) return st;
    w->n++;
    return tr_comm_wait_read(control, TR_LANE_MAIN, *ticket, err);
}

tr_status tr_wire_give(tr_wire *w, tr_comm *control, tr_announcement announced, void *plans,
                       tr_err *err)
{
    w->announced = announced;
    tr_status st = broadcast(w, control, &w->announced, sizeof w->announced, err);
    if (announced.flags & TR_STEP_IDLE) return st;
    return st == TR_OK ? broadcast(w, control, plans, announced.bytes, err) : st;
}

tr_status tr_wire_get(tr_wire *w, tr_comm *control, void *plans, size_t bytes_min, size_t bytes_max,
                      tr_err *err)
{
    const tr_announcement *a = &w->announced;
    tr_status st = broadcast(w, control, &w->announced, sizeof *a, err);

    if (st != TR_OK) return st;
    if ((a->flags & TR_STEP_IDLE) && !a->bytes && !a->status) return TR_OK;
    if (a->bytes < bytes_min || a->bytes > bytes_max || a->status > TR_E_STOP)
        return tr_fail(err, TR_E_COMM, "plans of %llu bytes were announced, status %u",
                       (unsigned long long)a->bytes, (unsigned)a->status);
    return broadcast(w, control, plans, a->bytes, err);
}

tr_status tr_wire_tell(tr_wire *w, tr_comm *control, const void *report, size_t bytes, tr_err *err)
{
    tr_status st = tr_comm_send(control, 0, report, bytes, &w->ticket[w->n], err);

    w->n += st == TR_OK;
    return st;
}
