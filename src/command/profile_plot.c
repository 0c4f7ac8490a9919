#include <config.h>

#include "command/profile_plot.h"

#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "profile/export.h"

static tr_status check_peak(const char *peak, tr_err *err)
{
    char *end = NULL;
    double gflops = strtod(peak, &end), gbs = 0;
    if (end != peak && *end == ',') {
        const char *second = end + 1;
        gbs = strtod(second, &end);
        if (end != second && !*end && gflops > 0 && gbs > 0 && gflops < 1e9 && gbs < 1e9)
            return TR_OK;
    }
    return tr_fail(err, TR_E_USAGE, "--peak %s: two positive numbers are wanted: GFLOPS,GBS", peak);
}

/* The script: beside the program, in the tree it was built from, or where it is installed relative to the program. */
static tr_status find_script(char *path, size_t n, const char *given, tr_err *err)
{
    static const char *const places[] = {"jobs", "../jobs", "../share/trireme"};
    char program[4096];
    if (given) {
        if (access(given, R_OK) != 0)
            return tr_fail(err, TR_E_INPUT, "%s: %s", given, strerror(errno));
        snprintf(path, n, "%s", given);
        return TR_OK;
    }
    const ssize_t length = readlink("/proc/self/exe", program, sizeof program - 1);
    program[length > 0 ? length : 0] = 0;
    char *slash = strrchr(program, '/');
    if (slash) *slash = 0;
    for (size_t i = 0; slash && i < sizeof places / sizeof *places; i++) {
        int used = snprintf(path, n, "%s/%s/profile_plot.py", program, places[i]);
        if (used > 0 && (size_t)used < n && access(path, R_OK) == 0) return TR_OK;
    }
    return tr_fail(
        err, TR_E_INPUT,
        "profile_plot.py is neither beside the program nor in its share/trireme; name it "
        "with --script");
}

/* What export made: plain files. */
static void remove_folder(const char *folder)
{
    char path[4608];
    DIR *d = opendir(folder);
    struct dirent *e;
    while (d && (e = readdir(d)) != NULL) {
        if (!strcmp(e->d_name, ".") || !strcmp(e->d_name, "..")) continue;
        snprintf(path, sizeof path, "%s/%s", folder, e->d_name);
        unlink(path);
    }
    if (d) closedir(d);
    rmdir(folder);
}

/* Its exit status, 128 + signal, or -1 with an error. */
static int run_python(const char *python, const char *script, const char *tables,
                      const tr_plot_options *o, tr_err *err)
{
    int status = 0;
    fflush(stdout);
    const pid_t child = fork();
    if (child == 0) {
        execlp(python, python, script, tables, o->prefix ? o->prefix : "profile-",
               o->peak ? o->peak : "", (char *)NULL);
        _exit(127);
    }
    while (child > 0 && waitpid(child, &status, 0) < 0)
        if (errno != EINTR) break;
    if (child < 0) tr_fail(err, TR_E_IO, "fork: %s", strerror(errno));
    return child < 0 ? -1 : WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

/* Python draws; its own messages go where ours go. The first python3 of PATH may be one without the system's packages. */
static tr_status draw(const char *script, const char *tables, const tr_plot_options *o, tr_err *err)
{
    enum { NOT_FOUND = 127, NO_MATPLOTLIB = 77 };
    int status = run_python("python3", script, tables, o, err);
    if (status == NOT_FOUND || status == NO_MATPLOTLIB)
        status = run_python("/usr/bin/python3", script, tables, o, err);
    switch (status) {
    case -1:
        return TR_E_IO;
    case 0:
        return TR_OK;
    case NOT_FOUND:
    case NO_MATPLOTLIB:
        return tr_fail(err, TR_E_INPUT,
                       "plot needs python3 with matplotlib (Debian: python3-matplotlib); export "
                       "--csv has the tables for another program");
    default:
        return tr_fail(err, TR_E_IO, "%s failed with status %d", script, status);
    }
}

tr_status tr_profile_plot(tr_reader *r, const tr_plot_options *o, tr_err *err)
{
    char script[4608], folder[4096];
    const char *tmp = getenv("TMPDIR");
    tr_status st = o->peak ? check_peak(o->peak, err) : TR_OK;
    if (st == TR_OK) st = find_script(script, sizeof script, o->script, err);
    if (st != TR_OK) return st;
    snprintf(folder, sizeof folder, "%s/trireme-plot-XXXXXX", tmp && *tmp ? tmp : "/tmp");
    if (!mkdtemp(folder)) return tr_fail(err, TR_E_IO, "%s: %s", folder, strerror(errno));
    st = tr_export_csv(folder, r, err);
    if (st == TR_OK) st = draw(script, folder, o, err);
    remove_folder(folder);
    return st;
}
