# SYNOPSIS
#   TR_WITH_PAPI
#
# DESCRIPTION
#   PAPI, optional: hardware and software events in profiles.
#
# USAGE
#   (absent)         used where pkg-config or the compiler finds it
#   --with-papi=DIR  use DIR/include and DIR/lib; an error where it is not there
#   --without-papi   do without it
#
# VARIABLES
#   PAPI_CFLAGS, PAPI_LIBS, tr_found_papi; HAVE_PAPI in config.h and for Automake

AC_DEFUN([TR_WITH_PAPI], [
  TR_WITH_PKG_OPTIONAL([papi], [[papi], [papi-7.0]], [papi.h], [papi], [PAPI_library_init])
])
