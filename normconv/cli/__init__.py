"""The command line: parse, call the API, render, exit code. Nothing else."""

from normconv.cli.app import main as main
