"""What the task scripts share: data, augmentation, models, metrics, training loop, records and figures."""
