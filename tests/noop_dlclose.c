/* Linked into every program of an address sanitizer build, with -rdynamic so that the loader takes it for the C library's.
 *
 * Open MPI leaks on purpose in its plugins and unloads them in MPI_Finalize. The leak report then has no names for
 * their frames, and suppressions by library (tests/lsan.supp) match nothing. Plugins that stay loaded keep their names. */
#include <config.h>

int dlclose(void *handle);

int dlclose(void *handle)
{
    (void)handle;
    return 0;
}
