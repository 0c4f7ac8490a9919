#include <config.h>

#include "profile/pack.h"

tr_status tr_profile_pack(tr_reader *r, const char *path, tr_err *err)
{
    (void)r;
    return tr_fail(err, TR_E_IO, "%s", path);
}
