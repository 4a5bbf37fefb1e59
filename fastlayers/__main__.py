"""Makes `python -m fastlayers` the same command as `fastlayers`."""

from fastlayers.cli import main

main(prog_name="fastlayers")
