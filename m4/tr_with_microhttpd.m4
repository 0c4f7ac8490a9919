# SYNOPSIS
#   TR_WITH_MICROHTTPD
#
# DESCRIPTION
#   GNU libmicrohttpd, optional: the HTTP side of the serve command.
#
# USAGE
#   (absent)               used where pkg-config or the compiler finds it
#   --with-microhttpd=DIR  use DIR/include and DIR/lib; an error where it is not there
#   --without-microhttpd   do without it
#
# VARIABLES
#   MICROHTTPD_CFLAGS, MICROHTTPD_LIBS, tr_found_microhttpd; HAVE_MICROHTTPD in config.h and for Automake

AC_DEFUN([TR_WITH_MICROHTTPD], [
  TR_WITH_PKG_OPTIONAL([microhttpd], [libmicrohttpd >= 0.9.71], [microhttpd.h], [microhttpd], [MHD_start_daemon])
])
