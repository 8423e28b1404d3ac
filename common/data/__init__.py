"""The tiles: the two data sets, batches of them on the device, augmentation and shifts of colour."""
