"""What the task scripts share: data, records, training, fine-tuning and explanations of one run."""
