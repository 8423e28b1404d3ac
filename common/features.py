"""The features of a frozen network, computed once and kept where the head is trained on them."""

from collections.abc import Callable, Sequence

import torch

from common.compute import Compute
from common.evaluation import progress_bar
from common.pretrained import FineTunedNetwork
from common.tiles import Batch, DeviceTiles

BATCH = 256
View = Callable[[torch.Tensor], torch.Tensor]  # uint8 (B, 3, H, W) to the same


class CachedFeatures:
    """`Tiles` of which only the features are kept, on the device that trains.

    `features` (views, N, …) float32 hold one or more views of every tile, the first of them not augmented;
    `labels` are (N,) int64.
    """

    def __init__(self, features: torch.Tensor, labels: torch.Tensor) -> None:
        self.features, self.labels = features, labels
        self.index_device = features.device

    def __len__(self) -> int:
        return len(self.labels)

    def inputs(self, indices: torch.Tensor, draws: torch.Generator | None = None) -> Batch:
        """Features (B, …) of the first view, or with `draws` of a random view of each tile, and labels (B,)."""
        n_views = len(self.features)
        labels = self.labels.index_select(0, indices)
        if draws is None or n_views == 1:
            return self.features[0].index_select(0, indices), labels
        # The augmentation `dihedral` draws in the same way: from its 8 views, both choose the same one for a tile.
        view = torch.randint(n_views, (len(indices),), generator=draws).to(self.index_device)
        return self.features[view, indices], labels

    def views(self, indices: torch.Tensor) -> Batch:
        """Features (views, B, …) of every view, and labels (B,)."""
        return self.features.index_select(1, indices), self.labels.index_select(0, indices)


@torch.no_grad()
def cache_features(
    model: FineTunedNetwork, tiles: DeviceTiles, views: Sequence[View], compute: Compute
) -> CachedFeatures:
    """Run every view of every tile through the frozen part of the network once."""
    model.eval()
    device = compute.device
    features = torch.empty(len(views), len(tiles), *model.feature_shape, device=device)
    labels = torch.empty(len(tiles), dtype=torch.int64, device=device)
    with progress_bar("features", len(views) * len(tiles)) as bar:
        for part in torch.split(torch.arange(len(tiles)), BATCH):
            images, labels[part] = tiles.batch(part.to(tiles.index_device))
            for number, view in enumerate(views):
                with compute.autocast():
                    features[number, part] = model.features(tiles.prepared(view(images))).float()
                bar.update(len(part))
    return CachedFeatures(features, labels)
