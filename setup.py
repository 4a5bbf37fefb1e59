"""Gives setuptools the compiled library, which CMakeLists.txt builds; the rest is pyproject.toml's."""

from pathlib import Path

import cmake_call
import places
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class BuildWithCMake(build_ext):
    """Has CMake build the library and put it, with build_info.json, where setuptools wants it."""

    def build_extension(self, ext: Extension) -> None:
        """Build `ext` into the folder that setuptools makes the package in."""
        cmake_call.install("fastlayers_ops", self._package())

    def copy_extensions_to_source(self) -> None:
        """For an editable install, copy the library and what setuptools does not know of."""
        super().copy_extensions_to_source()
        self.copy_file(str(self._package() / "build_info.json"), str(places.ROOT / "fastlayers"))

    def _package(self) -> Path:
        return Path(self.build_lib, "fastlayers")


# What setuptools writes on the way; by default it does so in the checkout.
elsewhere = (
    {}
    if places.IN_TREE
    else {"build": {"build_base": str(places.SCRATCH)}, "egg_info": {"egg_base": str(places.SCRATCH)}}
)

setup(
    ext_modules=[Extension("fastlayers._C", sources=[], py_limited_api=True)],
    cmdclass={"build_ext": BuildWithCMake},
    # torch's stable ABI and Python's: one wheel for every torch and every Python from these on.
    options={"bdist_wheel": {"py_limited_api": "cp311"}} | elsewhere,
)
