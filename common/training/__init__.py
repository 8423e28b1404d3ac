"""Training: the loop, the networks and the device they run on, the loss, and the measures."""
