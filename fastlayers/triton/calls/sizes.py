"""The sizes that each kernel takes, by their names in a frame and in the kernel's order."""

_AXES = ("n_outer", "n_inner", "channels", "spatial")
_TILES = ("tiles_inner", "tiles", "tiles_per_part")
_X, _R, _Y, _G, _P = ((f"{name}_outer", f"{name}_channel") for name in "xrygp")
_PLANES = ("height", "width", "pooled_height", "pooled_width")

# forward.py
STATISTICS = ("n_outer", "n_inner", "channels", *_TILES, "count", *_X)
MERGE_STATISTICS = ("channels", "parts", "count")
NORMALISE = (*_AXES, *_TILES, "bytes_inner", *_X, *_R, *_Y)
WHOLE_FORWARD = (*_AXES, "count", "bytes_inner", *_X, *_R, *_Y)

# backward.py
SUMS = (*_AXES, *_TILES, "bytes_inner", *_G, *_X, *_R, *_Y)
MERGE_SUMS = ("channels", "parts")
INPUT_GRADIENT = (*_AXES, "count", *_TILES, "bytes_inner", *_G, *_X, *_R, *_Y)
WHOLE_BACKWARD = (*_AXES, "count", "bytes_inner", *_G, *_X, *_R, *_Y)

# dropout.py
DROP = (*_AXES, *_TILES, *_X, *_Y)

# pooling.py
POOL = (
    "pooled_outer", "pooled_inner", "channels", *(f"pooled_{name}" for name in _TILES), *_PLANES, *_X, *_P,
)  # fmt: skip
WHOLE_POOL = ("n_outer", "n_inner", "channels", "count", "pooled_outer", "pooled_inner", *_PLANES, *_X, *_P)
POOL_GRADIENT = ("n_outer", "n_inner", "channels", "count", *_TILES, *_PLANES, *_X, *_Y, *_P)
