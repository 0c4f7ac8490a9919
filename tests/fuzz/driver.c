/* Replays corpus files through one fuzz target: every file named, and every file of every folder named. Without
 * arguments the program replay_NAME takes the source tree's tests/fuzz/corpus/NAME. An input that breaks an oracle
 * aborts, with the file's name on stderr. */
#include <config.h>

#include <dirent.h>
#include <errno.h>
#include <stdbool.h>
#include <sys/stat.h>

#include "tests/fuzz/fuzz.h"
#include "tests/vectors.h"

static size_t n_replayed;

static void replay_file(const char *path, size_t size)
{
    uint8_t *data = malloc(size ? size : 1);
    FILE *f = fopen(path, "rb");
    if (!data || !f || fread(data, 1, size, f) != size) {
        fprintf(stderr, "%s: %s\n", path, strerror(errno));
        exit(1);
    }
    fclose(f);
    fprintf(stderr, "%s\n", path); /* the last line of the log names what broke */
    LLVMFuzzerTestOneInput(data, size);
    free(data);
    n_replayed++;
}

/* Not deeper than the files of a folder. false: there is no such thing. */
static bool replay(const char *path, bool inside)
{
    struct stat sb;
    if (stat(path, &sb) != 0) return false;
    if (S_ISREG(sb.st_mode)) replay_file(path, (size_t)sb.st_size);
    if (!S_ISDIR(sb.st_mode) || inside) return true;

    struct dirent **entry;
    int n = scandir(path, &entry, NULL, alphasort);
    for (int i = 0; i < n; i++) {
        char name[8192];
        snprintf(name, sizeof name, "%s/%s", path, entry[i]->d_name);
        replay(name, true);
        free(entry[i]);
    }
    if (n >= 0) free(entry);
    return n >= 0;
}

int main(int argc, char **argv)
{
    for (int i = 1; i < argc; i++)
        if (!replay(argv[i], false)) {
            fprintf(stderr, "%s: %s\n", argv[i], strerror(errno));
            return 1;
        }
    if (argc == 1) {
        char name[512], path[4096];
        const char *slash = strrchr(argv[0], '/'), *self = slash ? slash + 1 : argv[0];
        if (strncmp(self, "replay_", 7) == 0) self += 7;
        snprintf(name, sizeof name, "tests/fuzz/corpus/%s", self);
        if (!replay(tr_source_path(path, sizeof path, name), false)) {
            fprintf(stderr, "%s: %s\n", path, strerror(errno));
            return 1;
        }
    }
    printf("%zu inputs\n", n_replayed);
    return n_replayed ? 0 : 77;
}
