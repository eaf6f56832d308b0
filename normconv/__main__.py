"""`python -m normconv`, which is what `accelerate launch -m` and `torchrun -m` take."""

from normconv.cli import main

main()
