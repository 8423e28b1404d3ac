"""The facts about PathMNIST: names, addresses, MD5s and numbers of tiles, as in medmnist's info.py.

They are copied because the import of medmnist takes three seconds and creates ~/.medmnist.
"""

NAME = "pathmnist"
TITLE = "PathMNIST"
COUNTS = {"train": 89_996, "val": 10_004, "test": 7_180}  # tiles of each split
CLASS_NAMES = (
    "adipose",
    "background",
    "debris",
    "lymphocytes",
    "mucus",
    "smooth muscle",
    "normal colon mucosa",
    "cancer-associated stroma",
    "colorectal adenocarcinoma epithelium",
)
MD5 = {  # of the official files, by tile side in pixels
    28: "a8b06965200029087d5bd730944a56c1",
    64: "55aa9c1e0525abe5a6b9d8343a507616",
    128: "ac42d08fb904d92c244187169d1fd1d9",
    224: "2c51a510bcdc9cf8ddb2af93af1eadec",
}
LABELS_SHA256 = {  # of the labels as uint8, in the order of the file with 28 px tiles
    "val": "d8ec3b53a6e1062b7cd0558c19d4907b32aaea691a4aa77c672634aa499d9947",
    "test": "3d08a60fe2cfec1415a3f0d38aabb442c646ec290e6be54b9e0242dff38730a7",
}

PHANTOM_TRAIN_TILES = 9000  # of the generated tiles in the place of PathMNIST's, without --train_tiles


def official_file(size: int) -> tuple[str, str, str]:
    """The name, the address and the MD5 of the official file with tiles of `size` pixels."""
    name = f"{NAME}.npz" if size == 28 else f"{NAME}_{size}.npz"
    return name, f"https://zenodo.org/records/10519652/files/{name}?download=1", MD5[size]


def has_stained_colours(red: float, green: float, blue: float) -> bool:
    """Whether a mean colour, 0..255, is one of tissue stained with haematoxylin and eosin, or of an empty slide.

    This is true for all test tiles but one, and for all but 0.01 % of the training tiles.
    """
    return min(red, blue) >= 80 and red - green >= (10 if green < 200 else -10)
