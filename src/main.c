/* trireme: find the subcommand, run it, print its error once, turn its status into the exit
 * code. */
#include <config.h>

#include <errno.h>
#include <fcntl.h>
#include <omp.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "command/command.h"
#include "kernels/kernels.h"

typedef struct subcommand {
    const char *name;
    tr_status (*run)(int argc, char **argv, tr_err *err); /* NULL: not built yet */
    const char *help;
} subcommand;

static const subcommand subcommands[] = {
    {"batch", tr_command_batch, "answer a file of requests; or one prompt; or join outputs"},
    {"bench", tr_command_bench, "measure kernels or steps"},
    {"plan", tr_command_plan, "what each rank would hold and send; no GPU needed"},
    {"profile", tr_command_profile, "read what a run left behind: show, diff, export, pack, plot"},
    {"doctor", tr_command_doctor, "check a launch before a big job; explain a hang after one"},
    {"serve", NULL, NULL},
    {"--version", tr_command_version, NULL},
};

static const subcommand *find(const char *name)
{
    for (size_t i = 0; i < sizeof subcommands / sizeof *subcommands; i++)
        if (!strcmp(subcommands[i].name, name)) return &subcommands[i];
    return NULL;
}

static tr_status help(tr_err *err)
{
    fputs("Usage: trireme COMMAND [options]\n"
          "       trireme COMMAND --help\n"
          "       trireme --version\n"
          "\n"
          "DeepSeek-V3.2 as one MPI program. Commands:\n",
          stdout);
    for (size_t i = 0; i < sizeof subcommands / sizeof *subcommands; i++)
        if (subcommands[i].help) printf("  %-8s  %s\n", subcommands[i].name, subcommands[i].help);
    return fflush(stdout) ? tr_fail(err, TR_E_IO, "standard output: %s", strerror(errno)) : TR_OK;
}

/* A descriptor 0, 1 or 2 that is closed would be given to the next file opened, and messages
 * would go into it (reliability.md 4, row 22). */
static void fill_standard(void)
{
    for (int fd = 0; fd <= 2; fd++) {
        if (fcntl(fd, F_GETFD) >= 0 || errno != EBADF) continue;
        int null = open("/dev/null", fd == 0 ? O_RDONLY : O_WRONLY);
        if (null < 0 || null == fd) continue;
        dup2(null, fd);
        close(null);
    }
}

/* OpenMP's library has room for its threads on the stack: a hundred thousand, by a slip in a batch script, would end in a fault.
 * The device's number of threads has a bound. */
static void bound_threads(void)
{
    const int n = tr_device_threads();
    if (omp_get_max_threads() > n) omp_set_num_threads(n);
}

int main(int argc, char **argv)
{
    tr_err err = {0};
    tr_status st;

    fill_standard();
    bound_threads();
    const char *name = argc > 1 ? argv[1] : "";
    const subcommand *c = find(name);
    if (!strcmp(name, "--help") || !strcmp(name, "-h"))
        st = help(&err);
    else if (c && c->run)
        st = c->run(argc - 1, argv + 1, &err);
    else if (c)
        st = tr_fail(&err, TR_E_USAGE, "%s: this is not built yet", name);
    else if (*name)
        st = tr_fail(&err, TR_E_USAGE, "%s: no such command (see trireme --help)", name);
    else
        st = tr_fail(&err, TR_E_USAGE, "a command is missing (see trireme --help)");
    /* Nobody else may have looked whether all of it was written. */
    if (st == TR_OK && (fflush(stdout) != 0 || ferror(stdout)))
        st = tr_fail(&err, TR_E_IO, "standard output: %s", strerror(errno));
    if (st != TR_OK && err.text[0]) fprintf(stderr, "trireme: %s\n", err.text);
    return tr_exit_code(st);
}
