#include <config.h>

#include "profile/figures.h"

#include <math.h>
#include <stdint.h>
#include <stdio.h>

/* Three digits. */
static int digits_after(double v)
{
    return v < 9.995 ? 2 : v < 99.95 ? 1 : 0;
}

tr_figure tr_figure_time(double seconds)
{
    tr_figure f;
    const double a = fabs(seconds);
    if (!isfinite(seconds))
        snprintf(f.s, sizeof f.s, "-");
    else if (a >= 3600 && a < 1e9)
        snprintf(f.s, sizeof f.s, "%s%d:%02d:%02d", seconds < 0 ? "-" : "", (int)(a / 3600),
                 (int)(a / 60) % 60, (int)a % 60);
    else if (a >= 1e9)
        snprintf(f.s, sizeof f.s, "%.3g s", seconds);
    else if (a >= 0.9995)
        snprintf(f.s, sizeof f.s, "%.*f s", digits_after(a), seconds);
    else if (a >= 0.9995e-3)
        snprintf(f.s, sizeof f.s, "%.*f ms", digits_after(a * 1e3), seconds * 1e3);
    else if (a > 0)
        snprintf(f.s, sizeof f.s, "%.*f us", digits_after(a * 1e6), seconds * 1e6);
    else
        snprintf(f.s, sizeof f.s, "0 s");
    return f;
}

static tr_figure scaled(double v, const char *const unit[5])
{
    tr_figure f;
    int k = 0;
    if (!isfinite(v)) {
        snprintf(f.s, sizeof f.s, "-");
        return f;
    }
    while (k < 4 && fabs(v) >= 999.5) {
        v /= 1000;
        k++;
    }
    if (fabs(v) >= 1e6)
        snprintf(f.s, sizeof f.s, "%.3g %s", v, unit[k]);
    else
        snprintf(f.s, sizeof f.s, "%.*f%s%s", k || v != floor(v) ? digits_after(fabs(v)) : 0, v,
                 *unit[k] ? " " : "", unit[k]);
    return f;
}

tr_figure tr_figure_bytes(double bytes)
{
    static const char *const unit[5] = {"B", "kB", "MB", "GB", "TB"};
    return scaled(bytes, unit);
}

tr_figure tr_figure_rate(double rate)
{
    static const char *const unit[5] = {"", "k", "M", "G", "T"};
    return scaled(rate, unit);
}

tr_figure tr_figure_count(double count)
{
    tr_figure f;
    if (!isfinite(count) || fabs(count) >= 1e7) return tr_figure_rate(count);
    const long n = lround(count), a = n < 0 ? -n : n;
    if (a >= 1000000)
        snprintf(f.s, sizeof f.s, "%s%ld,%03ld,%03ld", n < 0 ? "-" : "", a / 1000000,
                 a / 1000 % 1000, a % 1000);
    else if (a >= 1000)
        snprintf(f.s, sizeof f.s, "%s%ld,%03ld", n < 0 ? "-" : "", a / 1000, a % 1000);
    else
        snprintf(f.s, sizeof f.s, "%ld", n);
    return f;
}
