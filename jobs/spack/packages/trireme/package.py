"""trireme for Spack, 0.21 to 1.x.

    spack repo add trireme-0.1.0/jobs/spack
    cd FOLDER-OF-THE-TARBALL                      # as "make dist" leaves it
    spack install --no-checksum trireme +cuda ^openmpi schedulers=slurm

With an MPI of the site: an external in packages.yaml, as for any package.
"""

import os

from spack.package import *

try:  # from Spack 1.0 on
    from spack_repo.builtin.build_systems.autotools import AutotoolsPackage
except ImportError:  # before, spack.package had it
    pass


class Trireme(AutotoolsPackage):
    """MPI batch inference of DeepSeek-V3.2 models: JSON Lines in, JSON Lines out, resumable, profiled into HDF5."""

    manual_download = True
    url = "file://{0}/trireme-0.1.0.tar.xz".format(os.getcwd())

    license("MIT")

    version("0.1.0")

    variant("cuda", default=False, description="Build the CUDA backend")
    variant("cuda_arch", default="90a", values=("90a",), multi=False, when="+cuda", description="GPUs to build for")
    variant("papi", default=False, description="Read hardware and software counters through PAPI")
    variant("nvtx", default=False, description="Mark ranges for Nsight Systems")
    variant("openblas", default=False, description="Compare with OpenBLAS in trireme bench")

    depends_on("c", type="build")
    depends_on("cxx", type="build", when="+cuda")
    depends_on("gmake", type="build")
    depends_on("pkgconfig", type="build")
    depends_on("mpi")
    # Each rank writes a file of its own: a serial HDF5 is enough, a parallel one does no harm.
    depends_on("hdf5@1.10:+hl")
    depends_on("hwloc@2:")
    depends_on("jansson@2.10:")
    depends_on("pcre2")
    depends_on("xxhash@0.8:")
    depends_on("cuda@12.4:", when="+cuda")
    depends_on("nccl@2.28:", when="+cuda")  # several ranks with a GPU each
    depends_on("papi", when="+papi")
    depends_on("openblas", when="+openblas")
    depends_on("cmocka", type="test")

    # Refused, not ignored: it would do nothing.
    conflicts("+nvtx", when="@:0.1", msg="this version of trireme has no NVTX ranges")

    def configure_args(self):
        spec = self.spec
        args = ["--with-mpi={0}".format(spec["mpi"].prefix)]
        for name in ("hdf5", "hwloc", "jansson", "pcre2", "xxhash"):
            args.append("--with-{0}={1}".format(name, spec[name].prefix))
        for name in ("cuda", "papi", "openblas"):
            if "+" + name in spec:
                args.append("--with-{0}={1}".format(name, spec[name].prefix))
            else:
                args.append("--without-" + name)
        args.append("--with-nccl={0}".format(spec["nccl"].prefix) if "+cuda" in spec else "--without-nccl")
        if "+cuda" in spec:
            args.append("--with-cuda-arch=sm_{0}".format(spec.variants["cuda_arch"].value))
        args.append("--without-microhttpd")
        args.append("--with-cmocka={0}".format(spec["cmocka"].prefix) if self.run_tests else "--without-cmocka")
        return args

    @run_after("install")
    @on_package_attributes(run_tests=True)
    def says_its_version(self):
        Executable(join_path(self.prefix.bin, "trireme"))("--version")
