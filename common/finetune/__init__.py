"""Fine-tuning: pretrained weights and their network; a trained network, and its labels for pictures."""
