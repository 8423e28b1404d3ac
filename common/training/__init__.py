"""Training: the loop, the networks, the device, the optimiser, averages, and the measures."""
