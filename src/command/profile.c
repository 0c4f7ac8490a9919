/* trireme profile: what a run left behind, on a screen or in other formats. No MPI, no device. */
#include <config.h>

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "command/apart.h"
#include "command/command.h"
#include "command/options.h"
#include "command/profile_plot.h"
#include "profile/diff.h"
#include "profile/export.h"
#include "profile/pack.h"
#include "profile/show.h"

typedef struct profile_options {
    bool help, chrome, tau, csv, hatchet;
    const char *output, *by, *per, *script, *peak;
    int64_t top, rank;
} profile_options;

#define AT(field) offsetof(profile_options, field)

/* clang-format off */
static const tr_option table[] = {
    {NULL, 0, TR_OPTION_TITLE, 0, 0, 0, NULL, NULL, "show and diff"},
    {"top", 0, TR_OPTION_INT, AT(top), 0, 100000, "N", NULL,
     "rows of the table of operations or regions; 0: all (default 8; diff 25)"},
    {"by", 0, TR_OPTION_CHOICE, AT(by), 0, 0, "WHAT", "name|path",
     "diff: name, or path: every place in the tree of regions (default name)"},
    {"per", 0, TR_OPTION_CHOICE, AT(per), 0, 0, "WHAT", "run|step|token",
     "diff: times of the run, of a step or of a token (default run)"},

    {NULL, 0, TR_OPTION_TITLE, 0, 0, 0, NULL, NULL, "export"},
    {"chrome", 0, TR_OPTION_FLAG, AT(chrome), 0, 0, NULL, NULL,
     "JSON for Perfetto and chrome://tracing: one process per rank, one clock"},
    {"tau", 0, TR_OPTION_FLAG, AT(tau), 0, 0, NULL, NULL,
     "a folder of profile.N.0.T for ParaProf, CubeGUI and Hatchet"},
    {"csv", 0, TR_OPTION_FLAG, AT(csv), 0, 0, NULL, NULL,
     "a folder of tables; with diff: its table, in nanoseconds"},
    {"hatchet", 0, TR_OPTION_FLAG, AT(hatchet), 0, 0, NULL, NULL,
     "the tree of regions as Hatchet's literal, in JSON"},
    {"rank", 0, TR_OPTION_INT, AT(rank), 0, 65535, "N", NULL,
     "hatchet: of this rank (default: the mean of all)"},

    {NULL, 0, TR_OPTION_TITLE, 0, 0, 0, NULL, NULL, "plot"},
    {"peak", 0, TR_OPTION_TEXT, AT(peak), 0, 0, "GFLOPS,GBS", NULL,
     "of one rank, for the roofline (default: the best that the run reached)"},
    {"script", 0, TR_OPTION_TEXT, AT(script), 0, 0, "FILE", NULL,
     "profile_plot.py, where it is not beside the program"},

    {NULL, 0, TR_OPTION_TITLE, 0, 0, 0, NULL, NULL, "All"},
    {"output", 'o', TR_OPTION_TEXT, AT(output), 0, 0, "OUT", NULL,
     "file or folder; export --chrome, --hatchet: - is standard output (default); plot: what the names "
     "of the pictures begin with"},
    {"help", 'h', TR_OPTION_FLAG, AT(help), 0, 0, NULL, NULL, "this text"},
};
/* clang-format on */

enum { N_TABLE = sizeof table / sizeof *table };

static void help(FILE *out)
{
    fputs("Usage: trireme profile show FILE [--top N]\n"
          "       trireme profile diff A B [--by WHAT] [--per WHAT] [--top N] [--csv]\n"
          "       trireme profile export FILE --chrome|--tau|--csv|--hatchet [-o OUT]\n"
          "       trireme profile pack FILE -o OUT.h5\n"
          "       trireme profile plot FILE [-o PREFIX] [--peak GFLOPS,GBS]\n"
          "\n"
          "FILE is what --profile wrote, a packed file, or the folder FILE.d/RUN of rank\n"
          "files; of a run that was killed, after h5clear -s on each of its .part files.\n",
          out);
    tr_options_help(out, table, N_TABLE);
}

/* ---- actions ------------------------------------------------------------------------------------------------------- */

static tr_status show(tr_reader *r, const profile_options *o, tr_err *err)
{
    tr_summary s;
    tr_status st = tr_summary_make(&s, r, err);
    if (st != TR_OK) return st;
    tr_profile_show(stdout, r, &s, o->top >= 0 ? (int)o->top : 8);
    tr_summary_free(&s);
    return TR_OK;
}

static tr_status diff(tr_reader *a, const char *path, const profile_options *o, tr_err *err)
{
    tr_reader *b = NULL;
    const tr_diff_options d = {
        .by_path = !strcmp(o->by, "path"),
        .per = !strcmp(o->per, "step")    ? TR_DIFF_STEP
               : !strcmp(o->per, "token") ? TR_DIFF_TOKEN
                                          : TR_DIFF_RUN,
        .csv = o->csv,
        .n_rows = o->top >= 0 ? (int)o->top : 25,
    };
    tr_status st = tr_reader_open(&b, path, err);
    if (st == TR_OK) st = tr_profile_diff(stdout, a, b, &d, err);
    tr_reader_close(b);
    return st;
}

/* A pipe or a device that is there: written to, never replaced. */
static bool is_stream(const char *path)
{
    struct stat sb;
    return stat(path, &sb) == 0 && !S_ISREG(sb.st_mode) && !S_ISDIR(sb.st_mode);
}

/* One stream of text: to a file, made whole or not at all, or to standard output. */
static tr_status export_text(tr_reader *r, const profile_options *o, tr_err *err)
{
    const bool to_stdout = !o->output || !strcmp(o->output, "-");
    const bool whole = !to_stdout && !is_stream(o->output);
    char part[4096];
    FILE *out = stdout;
    if (!to_stdout) {
        if (snprintf(part, sizeof part, "%s%s", o->output, whole ? ".part" : "") >=
            (int)sizeof part)
            return tr_fail(err, TR_E_USAGE, "-o %s: too long a name", o->output);
        out = fopen(part, "we");
        if (!out) return tr_fail(err, TR_E_IO, "%s: %s", part, strerror(errno));
    }
    tr_status st =
        o->chrome ? tr_export_chrome(out, r, err) : tr_export_hatchet(out, r, (int)o->rank, err);
    if (to_stdout) return st;
    const bool failed = ferror(out) != 0;
    if ((fclose(out) != 0 || failed) && st == TR_OK)
        st = tr_fail(err, TR_E_IO, "%s: %s", part, strerror(errno ? errno : EIO));
    if (st == TR_OK && whole && rename(part, o->output) != 0)
        st = tr_fail(err, TR_E_IO, "%s: %s", o->output, strerror(errno));
    if (st != TR_OK && whole) remove(part);
    return st;
}

static tr_status export(tr_reader *r, const profile_options *o, tr_err *err)
{
    if (o->csv) return tr_export_csv(o->output ? o->output : "profile.csv", r, err);
    if (o->tau) return tr_export_tau(o->output ? o->output : "profile.tau", r, err);
    return export_text(r, o, err);
}

/* ---- the command line ---------------------------------------------------------------------------------------------- */

typedef enum action { SHOW, DIFF, EXPORT, PACK, PLOT, N_ACTIONS } action;
static const char *const actions[] = {"show", "diff", "export", "pack", "plot"};

/* Options that belong to another action are refused, not ignored. */
static tr_status check(action a, const profile_options *o, tr_err *err)
{
    const struct {
        const char *name;
        bool given;
        unsigned of; /* bit: action */
    } rows[] = {
        {"--top", o->top >= 0, 1 << SHOW | 1 << DIFF},
        {"--by", o->by != NULL, 1 << DIFF},
        {"--per", o->per != NULL, 1 << DIFF},
        {"--chrome", o->chrome, 1 << EXPORT},
        {"--tau", o->tau, 1 << EXPORT},
        {"--csv", o->csv, 1 << EXPORT | 1 << DIFF},
        {"--hatchet", o->hatchet, 1 << EXPORT},
        {"--rank", o->rank >= 0, 1 << EXPORT},
        {"--peak", o->peak != NULL, 1 << PLOT},
        {"--script", o->script != NULL, 1 << PLOT},
        {"-o", o->output != NULL, 1 << EXPORT | 1 << PACK | 1 << PLOT},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
        if (rows[i].given && !(rows[i].of >> a & 1))
            return tr_fail(err, TR_E_USAGE, "profile %s does not take %s", actions[a],
                           rows[i].name);
    if (a == EXPORT && o->chrome + o->tau + o->csv + o->hatchet != 1)
        return tr_fail(err, TR_E_USAGE,
                       "profile export: one of --chrome, --tau, --csv and --hatchet is wanted");
    if (o->rank >= 0 && !o->hatchet) return tr_fail(err, TR_E_USAGE, "--rank goes with --hatchet");
    if (a == PACK && (!o->output || !*o->output))
        return tr_fail(err, TR_E_USAGE, "profile pack: -o OUT.h5 is missing");
    if (o->output && !strcmp(o->output, "-") && (a == PACK || o->tau || o->csv))
        return tr_fail(err, TR_E_USAGE, "-o -: %s is wanted", a == PACK ? "a file" : "a folder");
    return TR_OK;
}

/* What is read is not written over, nor what is no profile by one. */
static tr_status check_output(action a, const tr_reader *r, const char *output, tr_err *err)
{
    if (!output || (a != EXPORT && a != PACK)) return TR_OK;
    if (tr_reader_reads(r, output))
        return tr_fail(err, TR_E_USAGE, "-o %s: a file of the profile that is read", output);
    return a == PACK ? tr_apart_replaced("-o", output, err) : TR_OK;
}

static tr_status act(action a, tr_reader *r, char **file, const profile_options *o, tr_err *err)
{
    switch (a) {
    case SHOW:
        return show(r, o, err);
    case DIFF:
        return diff(r, file[1], o, err);
    case EXPORT:
        return export(r, o, err);
    case PACK:
        return tr_profile_pack(r, o->output, err);
    default:
        return tr_profile_plot(
            r, &(tr_plot_options){.prefix = o->output, .peak = o->peak, .script = o->script}, err);
    }
}

static tr_status run(action a, char **file, profile_options *o, tr_err *err)
{
    tr_reader *r = NULL;
    tr_status st = check(a, o, err);
    if (st != TR_OK) return st;
    if (!o->by) o->by = "name";
    if (!o->per) o->per = "run";
    st = tr_reader_open(&r, file[0], err);
    if (st != TR_OK) return st;
    for (size_t i = 0; a != SHOW && a != DIFF && tr_reader_note(r, i); i++)
        fprintf(stderr, "trireme: %s: %s\n", file[0], tr_reader_note(r, i));
    st = check_output(a, r, o->output, err);
    if (st == TR_OK) st = act(a, r, file, o, err);
    tr_reader_close(r);
    return st;
}

static tr_status parse(profile_options *o, action *a, char ***file, int argc, char **argv,
                       tr_err *err)
{
    int rest = 0;
    *o = (profile_options){.top = -1, .rank = -1};
    tr_status st = tr_options_parse(table, N_TABLE, o, argc, argv, &rest, err);
    if (st != TR_OK || o->help) return st;
    const char *name = rest < argc ? argv[rest] : "";
    *a = SHOW;
    while (*a < N_ACTIONS && strcmp(actions[*a], name) != 0)
        (*a)++;
    if (*a == N_ACTIONS)
        return tr_fail(err, TR_E_USAGE, "profile%s%s: show, diff, export, pack or plot is wanted",
                       *name ? " " : "", name);
    const int wanted = *a == DIFF ? 2 : 1, given = argc - rest - 1;
    if (given < wanted)
        return tr_fail(err, TR_E_USAGE, "profile %s: %s missing", name,
                       wanted == 2 ? "two profiles are wanted, one is" : "FILE is");
    if (given > wanted)
        return tr_fail(err, TR_E_USAGE, "%s: an argument that belongs to no option",
                       argv[rest + 1 + wanted]);
    *file = argv + rest + 1;
    return TR_OK;
}

tr_status tr_command_profile(int argc, char **argv, tr_err *err)
{
    profile_options options;
    action a = SHOW;
    char **file = NULL;
    tr_status st = parse(&options, &a, &file, argc, argv, err);

    if (st == TR_OK && options.help)
        help(stdout);
    else if (st == TR_OK)
        st = run(a, file, &options, err);
    if (st == TR_OK && (fflush(stdout) != 0 || ferror(stdout)))
        st = tr_fail(err, TR_E_IO, "standard output: %s", strerror(errno));
    return st;
}
