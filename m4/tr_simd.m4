# SYNOPSIS
#   TR_SIMD
#
# DESCRIPTION
#   Whether the compiler can build the AVX2, AVX-512 and AMX versions of the CPU kernels.  Which of them
#   runs is decided at start-up, by the processor; this is only about building them.
#
# USAGE
#   (absent)         built where the compiler takes the flags: x86-64
#   --disable-simd   the plain C kernels alone
#   --enable-simd    an error where the compiler does not take the flags
#
# VARIABLES
#   AVX2_CFLAGS, AVX512_CFLAGS, AMX_CFLAGS   flags for *_avx2.c, *_avx512.c and *_amx.c
#   TR_HAVE_X86_SIMD, TR_HAVE_AMX            defined in config.h and Automake conditionals; where there is
#                                            AMX there is the rest

AC_DEFUN([TR_SIMD], [
  AC_ARG_ENABLE([simd], [AS_HELP_STRING([--disable-simd], [build the plain C kernels alone])],
    [], [enable_simd=check])
  AC_SUBST([AVX2_CFLAGS], ["-mavx2 -mfma -mf16c"])
  AC_SUBST([AVX512_CFLAGS], ["$AVX2_CFLAGS -mavx512f -mavx512bw -mavx512vl -mavx512dq"])
  AC_SUBST([AMX_CFLAGS], ["$AVX512_CFLAGS -mgfni -mamx-tile -mamx-bf16"])
  tr_simd=no
  tr_amx=no
  AS_IF([test "$enable_simd" != no], [
    AC_CACHE_CHECK([whether $CC builds AVX2 and AVX-512 code], [tr_cv_simd], [
      tr_save_CFLAGS=$CFLAGS
      CFLAGS="$CFLAGS $AVX512_CFLAGS"
      AC_LINK_IFELSE([AC_LANG_PROGRAM([[#include <immintrin.h>]], [[
        __m512 a = _mm512_set1_ps(1.0f), b = _mm512_fmadd_ps(a, a, a);
        __m512i i = _mm512_cvtepu8_epi16(_mm256_set1_epi8(1));
        return (int)_mm512_reduce_add_ps(b) + (int)_mm512_movepi16_mask(i) +
               _mm256_movemask_ps(_mm256_cvtph_ps(_mm_setzero_si128())) + __builtin_cpu_supports("avx512dq");]])],
        [tr_cv_simd=yes], [tr_cv_simd=no])
      CFLAGS=$tr_save_CFLAGS
    ])
    tr_simd=$tr_cv_simd
    AS_IF([test "$enable_simd:$tr_simd" = yes:no],
      [AC_MSG_ERROR([--enable-simd: $CC does not build AVX2 and AVX-512 code])])
  ])
  AS_IF([test "$tr_simd" = yes], [
    AC_CACHE_CHECK([whether $CC builds AMX code], [tr_cv_amx], [
      tr_save_CFLAGS=$CFLAGS
      CFLAGS="$CFLAGS $AMX_CFLAGS"
      AC_LINK_IFELSE([AC_LANG_PROGRAM([[#include <immintrin.h>
#include <sys/syscall.h>]], [[
        __m512i a = _mm512_gf2p8affine_epi64_epi8(_mm512_set1_epi8(1), _mm512_set1_epi8(1), 0);
        _tile_zero(0);
        _tile_dpbf16ps(0, 1, 2);
        _tile_release();
        return SYS_arch_prctl + (int)_mm512_reduce_or_epi64(a);]])],
        [tr_cv_amx=yes], [tr_cv_amx=no])
      CFLAGS=$tr_save_CFLAGS
    ])
    tr_amx=$tr_cv_amx
  ])
  AS_IF([test "$tr_simd" = yes],
    [AC_DEFINE([TR_HAVE_X86_SIMD], [1], [Define to 1 if the AVX2 and AVX-512 kernels are built.])])
  AM_CONDITIONAL([TR_HAVE_X86_SIMD], [test "$tr_simd" = yes])
  AS_IF([test "$tr_amx" = yes], [AC_DEFINE([TR_HAVE_AMX], [1], [Define to 1 if the AMX kernels are built.])])
  AM_CONDITIONAL([TR_HAVE_AMX], [test "$tr_amx" = yes])
])
