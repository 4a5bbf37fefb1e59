"""The benchmarks of fastlayers: one definition of cases for ``fastlayers bench`` and ``pytest benchmarks``."""
