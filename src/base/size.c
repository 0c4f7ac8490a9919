#include <config.h>

#include "base/size.h"

#include <stdlib.h>

void *tr_calloc(size_t n, size_t size)
{
    return calloc(n ? n : 1, size ? size : 1);
}
