# SYNOPSIS
#   TR_HARDENING
#
# DESCRIPTION
#   What the compiler and the linker can do against memory errors: stack protector, position independent
#   program, read-only relocations, locals that start as zero, and the C library's checked functions
#   (_FORTIFY_SOURCE, in config.h because it only works where the file is optimised).  Left out of
#   sanitizer builds, which find more.  Needs TR_SANITIZE before it.
#
# USAGE
#   (absent)              as far as the compiler knows it
#   --disable-hardening   none of it, to measure what it costs
#
# VARIABLES
#   HARDEN_CFLAGS, HARDEN_LDFLAGS
#   tr_hardening   "yes" or "no"

AC_DEFUN([TR_HARDENING], [
  AC_REQUIRE([TR_SANITIZE])
  AC_ARG_ENABLE([hardening],
    [AS_HELP_STRING([--disable-hardening], [build without stack protector and the like])],
    [], [enable_hardening=yes])
  tr_hardening=$enable_hardening
  AS_IF([test "$tr_sanitize" != no], [tr_hardening="no (sanitizer)"])
  HARDEN_CFLAGS= HARDEN_LDFLAGS=
  AS_IF([test "$tr_hardening" = yes], [
    TR_CHECK_CFLAGS([HARDEN_CFLAGS], [-fstack-protector-strong -fPIE -ftrivial-auto-var-init=zero])
    TR_CHECK_LDFLAGS([HARDEN_LDFLAGS], [-pie -Wl,-z,relro -Wl,-z,now])
    AC_DEFINE([TR_HARDEN], [1], [Define to 1 to use the C library's checked functions.])
  ])
  AH_BOTTOM([#if defined TR_HARDEN && defined __OPTIMIZE__ && !defined _FORTIFY_SOURCE
#define _FORTIFY_SOURCE 2
#endif])
  AC_SUBST([HARDEN_CFLAGS])
  AC_SUBST([HARDEN_LDFLAGS])
])
