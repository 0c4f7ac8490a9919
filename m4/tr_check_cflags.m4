# SYNOPSIS
#   TR_CHECK_CFLAGS(VARIABLE, FLAGS)
#   TR_CHECK_LDFLAGS(VARIABLE, FLAGS)
#
# DESCRIPTION
#   Append to VARIABLE each of FLAGS (separated by blanks) with which a program compiles (links) without
#   a warning.  Flags that the compiler does not know are left out silently: config.log has them.

AC_DEFUN([TR_CHECK_CFLAGS], [_TR_CHECK_FLAGS([$1], [$2], [CFLAGS], [AC_COMPILE_IFELSE])])
AC_DEFUN([TR_CHECK_LDFLAGS], [_TR_CHECK_FLAGS([$1], [$2], [LDFLAGS], [AC_LINK_IFELSE])])

AC_DEFUN([_TR_CHECK_FLAGS], [
  m4_foreach_w([tr_flag], [$2], [
    AC_CACHE_CHECK([whether $CC takes tr_flag], [AS_TR_SH([tr_cv_]$3[_]m4_quote(tr_flag))], [
      tr_save_flags=$[]$3
      $3="$[]$3 -Werror tr_flag"
      $4([AC_LANG_PROGRAM([], [])], [AS_TR_SH([tr_cv_]$3[_]m4_quote(tr_flag))=yes],
        [AS_TR_SH([tr_cv_]$3[_]m4_quote(tr_flag))=no])
      $3=$tr_save_flags
    ])
    AS_IF([test "$AS_TR_SH([tr_cv_]$3[_]m4_quote(tr_flag))" = yes], [AS_VAR_APPEND([$1], [" tr_flag"])])
  ])
])
