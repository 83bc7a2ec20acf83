"""Real replica groups on this machine: start them by torchrun, kill, restart and watch them."""
