/* The CPUs next to a PCI device, on a machine that hwloc is told of (HWLOC_XMLFILE): two NUMA nodes of one CPU each, a GPU at the
 * second and one at both. */
#include <config.h>

#include <sched.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "kernels/near.h"

static const char machine[] =
    "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n"
    "<!DOCTYPE topology SYSTEM \"hwloc2.dtd\">\n"
    "<topology version=\"2.0\">\n"
    "<object type=\"Machine\" os_index=\"0\" cpuset=\"0x00000003\" complete_cpuset=\"0x00000003\" "
    "allowed_cpuset=\"0x00000003\" nodeset=\"0x00000003\" complete_nodeset=\"0x00000003\" "
    "allowed_nodeset=\"0x00000003\" gp_index=\"1\">\n"
    "%s%s"
    "<object type=\"Bridge\" os_index=\"0\" gp_index=\"40\" bridge_type=\"0-1\" depth=\"0\" "
    "bridge_pci=\"0000:[80-8f]\">\n"
    "<object type=\"PCIDev\" os_index=\"0\" gp_index=\"41\" pci_busid=\"0000:81:00.0\" "
    "pci_type=\"0302 [10de:2335] [10de:18be] a1\" pci_link_speed=\"0.0\"/>\n"
    "</object>\n"
    "</object>\n"
    "</topology>\n";

/* Node and CPU number i, with or without a GPU behind a bridge. */
static void write_package(char *out, size_t room, int i, int gpu)
{
    char bridge[512] = "";
    const unsigned set = 1u << i;

    if (gpu)
        snprintf(bridge, sizeof bridge,
                 "<object type=\"Bridge\" os_index=\"1\" gp_index=\"50\" bridge_type=\"0-1\" "
                 "depth=\"0\" bridge_pci=\"0000:[1a-1f]\">\n"
                 "<object type=\"PCIDev\" os_index=\"1\" gp_index=\"51\" "
                 "pci_busid=\"0000:1b:00.0\" pci_type=\"0302 [10de:2335] [10de:18be] a1\" "
                 "pci_link_speed=\"0.0\"/>\n</object>\n");
    snprintf(
        out, room,
        "<object type=\"Package\" os_index=\"%d\" cpuset=\"0x%08x\" complete_cpuset=\"0x%08x\" "
        "nodeset=\"0x%08x\" complete_nodeset=\"0x%08x\" gp_index=\"%d\">\n"
        "<object type=\"NUMANode\" os_index=\"%d\" cpuset=\"0x%08x\" "
        "complete_cpuset=\"0x%08x\" nodeset=\"0x%08x\" complete_nodeset=\"0x%08x\" "
        "gp_index=\"%d\" local_memory=\"1048576\"/>\n"
        "<object type=\"Core\" os_index=\"%d\" cpuset=\"0x%08x\" complete_cpuset=\"0x%08x\" "
        "nodeset=\"0x%08x\" complete_nodeset=\"0x%08x\" gp_index=\"%d\">\n"
        "<object type=\"PU\" os_index=\"%d\" cpuset=\"0x%08x\" complete_cpuset=\"0x%08x\" "
        "nodeset=\"0x%08x\" complete_nodeset=\"0x%08x\" gp_index=\"%d\"/>\n"
        "</object>\n%s</object>\n",
        i, set, set, set, set, 10 + i, i, set, set, set, set, 20 + i, i, set, set, set, set, 30 + i,
        i, set, set, set, set, 60 + i, bridge);
}

static void test_two_nodes(void **state)
{
    char path[] = "/tmp/trireme-near.XXXXXX", first[2048], second[2048];
    cpu_set_t before, after;
    const int fd = mkstemp(path);
    FILE *f = fd >= 0 ? fdopen(fd, "w") : NULL;

    (void)state;
    assert_non_null(f);
    write_package(first, sizeof first, 0, 0);
    write_package(second, sizeof second, 1, 1);
    fprintf(f, machine, first, second);
    assert_int_equal(fclose(f), 0);
    assert_int_equal(sched_getaffinity(0, sizeof before, &before), 0);
    setenv("HWLOC_XMLFILE", path, 1);

    tr_near near = tr_near_find("0000:1b:00.0", false);
    assert_int_equal(near.numa_node, 1);
    assert_string_equal(near.cpus, "1");
    assert_false(near.bound);
    /* between two nodes: nowhere */
    near = tr_near_find("0000:81:00.0", true);
    assert_int_equal(near.numa_node, -1);
    assert_string_equal(near.cpus, "");
    assert_false(near.bound);
    assert_int_equal(sched_getaffinity(0, sizeof after, &after), 0);
    assert_true(CPU_EQUAL(&before, &after));

    setenv("HWLOC_THISSYSTEM", "1", 1); /* the description is of this machine: binding is real */
    if (CPU_ISSET(0, &before) && CPU_ISSET(1, &before)) {
        near = tr_near_find("0000:1b:00.0", true);
        assert_true(near.bound);
        assert_int_equal(near.numa_node, 1);
        assert_int_equal(sched_getaffinity(0, sizeof after, &after), 0);
        assert_int_equal(CPU_COUNT(&after), 1);
        assert_true(CPU_ISSET(1, &after));
        /* The launcher's mask has none of its CPUs: nothing is done. */
        CPU_ZERO(&after);
        CPU_SET(0, &after);
        assert_int_equal(sched_setaffinity(0, sizeof after, &after), 0);
        near = tr_near_find("0000:1b:00.0", true);
        assert_false(near.bound);
        assert_int_equal(near.numa_node, 1);
        assert_string_equal(near.cpus, "");
        assert_int_equal(sched_getaffinity(0, sizeof after, &after), 0);
        assert_true(CPU_ISSET(0, &after));
        assert_int_equal(sched_setaffinity(0, sizeof before, &before), 0);
    }
    unsetenv("HWLOC_THISSYSTEM");
    unsetenv("HWLOC_XMLFILE");
    unlink(path);
}

/* On this machine, whatever it is: no such device, no such address. */
static void test_nowhere(void **state)
{
    static const char *const pci[] = {"ffff:ff:1f.7", "", "no address", "0000:1b"};
    cpu_set_t before, after;

    (void)state;
    assert_int_equal(sched_getaffinity(0, sizeof before, &before), 0);
    for (size_t i = 0; i < sizeof pci / sizeof *pci; i++) {
        const tr_near near = tr_near_find(pci[i], true);
        assert_int_equal(near.numa_node, -1);
        assert_false(near.bound);
        assert_string_equal(near.cpus, "");
    }
    assert_int_equal(sched_getaffinity(0, sizeof after, &after), 0);
    assert_true(CPU_EQUAL(&before, &after));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_two_nodes),
        cmocka_unit_test(test_nowhere),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
