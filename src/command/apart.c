#include <config.h>

#include "command/apart.h"

#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* What is written for `-o OUT` (runfile.c, journal.c, saved.c) and for `--profile FILE` (profile.c), by the end of its name. */
static const char *const beside_out[] = {"", ".run", ".lock", ".saved", ".saved.tmp", ".tmp"};
static const char *const beside_merged[] = {"", ".tmp"};
static const char *const beside_profile[] = {"", ".part"};

typedef struct written {
    const char *option, *given; /* "-o", its argument */
    const char *const *end;
    int n_ends;
} written;

/* The folder a file lies in, or would lie in. */
static bool stat_folder(const char *path, struct stat *sb, bool *no_memory)
{
    char *copy = strdup(path);
    *no_memory |= !copy;
    const bool found = copy && stat(dirname(copy), sb) == 0;
    free(copy);
    return found;
}

static const char *last_part(const char *path)
{
    const char *slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

static bool same_number(const struct stat *a, const struct stat *b)
{
    return a->st_dev == b->st_dev && a->st_ino == b->st_ino;
}

/* One file under both names; of two that do not exist yet, one name in one folder. */
static bool same_file(const char *a, const char *b, bool *no_memory)
{
    struct stat sa, sb;
    const bool has_a = stat(a, &sa) == 0, has_b = stat(b, &sb) == 0;

    if (has_a && has_b) return same_number(&sa, &sb);
    if (has_a != has_b || strcmp(last_part(a), last_part(b)) != 0) return false;
    return stat_folder(a, &sa, no_memory) && stat_folder(b, &sb, no_memory) &&
           same_number(&sa, &sb);
}

/* None of what is written is the file `path`, which `option` names. */
static tr_status check_one(const written *w, const char *option, const char *path, tr_err *err)
{
    tr_status st = TR_OK;
    bool no_memory = false;

    for (int i = 0; i < w->n_ends && st == TR_OK; i++) {
        char *name = NULL;
        if (asprintf(&name, "%s%s", w->given, w->end[i]) < 0) {
            name = NULL;
            no_memory = true;
        } else if (same_file(path, name, &no_memory)) {
            st = tr_fail(err, TR_E_USAGE,
                         "%s %.300s: the job would write to it, as the %.300s of %s", option, path,
                         name, w->option);
        }
        free(name);
        if (no_memory && st == TR_OK) st = tr_fail(err, TR_E_MEMORY, "%s: out of memory", path);
    }
    return st;
}

tr_status tr_apart_replaced(const char *option, const char *path, tr_err *err)
{
    static const char magic[8] = "\x89HDF\r\n\x1a\n";
    char begins[sizeof magic];
    struct stat sb;

    if (stat(path, &sb) != 0 || (S_ISREG(sb.st_mode) && !sb.st_size)) return TR_OK;
    const int fd = S_ISREG(sb.st_mode) ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    const bool ours = fd >= 0 && pread(fd, begins, sizeof begins, 0) == (ssize_t)sizeof begins &&
                      memcmp(begins, magic, sizeof magic) == 0;
    if (fd >= 0) close(fd);
    if (ours) return TR_OK;
    return tr_fail(err, TR_E_USAGE,
                   "%s %s: there is such a file, and it is no profile: delete it, or give "
                   "another name",
                   option, path);
}

tr_status tr_apart_check(const tr_batch_options *o, tr_err *err)
{
    const bool has_in = o->input && strcmp(o->input, "-") != 0;
    tr_status st = TR_OK;
    written out = {"-o", NULL, beside_out, sizeof beside_out / sizeof *beside_out};
    const written profile = {"--profile", o->profile, beside_profile,
                             o->profile ? sizeof beside_profile / sizeof *beside_profile : 0};

    if (o->merge) {
        out.end = beside_merged;
        out.n_ends = sizeof beside_merged / sizeof *beside_merged;
    }
    if (o->output && strcmp(o->output, "-") != 0)
        out.given = o->output;
    else
        out.n_ends = 0;
    if (has_in) st = check_one(&out, "-i", o->input, err);
    for (int i = 0; o->merge && i < o->n_parts && st == TR_OK; i++)
        st = check_one(&out, "PART", o->part[i], err);
    if (st == TR_OK && has_in) st = check_one(&profile, "-i", o->input, err);
    if (st == TR_OK && o->profile) st = check_one(&out, "--profile", o->profile, err);
    if (st == TR_OK && o->profile) st = tr_apart_replaced("--profile", o->profile, err);
    return st;
}
