"""Run jobs/spack's recipe without Spack: for each combination of its variants, the arguments that it gives to configure.

usage: spack_recipe.py PACKAGE.PY       prints one line of arguments for each combination; a conflict gives none
"""

import itertools
import sys
import types


class Recorder:
    """The directives that a class body may use, and what they said."""

    def __init__(self):
        self.variants, self.conflicts, self.depends = {}, [], []

    def namespace(self):
        nothing = lambda *args, **kw: lambda f: f
        return {
            "AutotoolsPackage": object,
            "Executable": nothing,
            "conflicts": lambda spec, when=None, msg=None: self.conflicts.append(spec),
            "depends_on": lambda spec, type=None, when=None: self.depends.append((spec, type, when)),
            "join_path": lambda *parts: "/".join(parts),
            "license": lambda *args: None,
            "on_package_attributes": nothing,
            "run_after": nothing,
            "variant": lambda name, **kw: self.variants.__setitem__(name, kw),
            "version": lambda *args, **kw: None,
        }


class Spec:
    """Of a concrete spec what the recipe asks: "+name" in it, the prefix of a dependency that this spec has, variants."""

    def __init__(self, recorder, on, test):
        self.on = on
        self.names = set()
        for spec, kind, when in recorder.depends:
            if (when is None or when[1:] in on) and (kind != "test" or test):
                self.names.add(spec.split("@")[0])
        self.variants = {"cuda_arch": types.SimpleNamespace(value=recorder.variants["cuda_arch"]["default"])}

    def __contains__(self, text):
        return text[0] == "+" and text[1:] in self.on

    def __getitem__(self, name):
        if name not in self.names:
            sys.exit("spack_recipe: no depends_on(%r) holds here, with %s" % (name, sorted(self.on)))
        return types.SimpleNamespace(prefix="/opt/" + name)


def main(path):
    recorder = Recorder()
    module = types.ModuleType("spack.package")
    module.__dict__.update(recorder.namespace())
    sys.modules["spack"], sys.modules["spack.package"] = types.ModuleType("spack"), module
    scope = {"__name__": "package"}
    with open(path) as recipe:
        exec(compile(recipe.read(), path, "exec"), scope)
    switches = [name for name, kw in recorder.variants.items() if kw["default"] in (False, True)]
    if sorted(switches + ["cuda_arch"]) != sorted(recorder.variants) or "cuda" not in switches:
        sys.exit("spack_recipe: other variants than expected: %s" % sorted(recorder.variants))
    for values in itertools.product((False, True), repeat=len(switches)):
        on = {name for name, value in zip(switches, values) if value}
        if any(conflict[1:] in on for conflict in recorder.conflicts):
            continue
        for test in (False, True):
            package = scope["Trireme"]()
            package.spec, package.run_tests = Spec(recorder, on, test), test
            print(" ".join(package.configure_args()))


main(sys.argv[1])
