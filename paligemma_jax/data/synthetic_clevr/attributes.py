"""The attributes of objects in CLEVR's world, and the possible answers to questions."""

# Display colours (sRGB, 0..255) of CLEVR v1.0, Johnson et al. 2017, https://arxiv.org/abs/1612.06890
COLORS = {
    "gray": (87, 87, 87),
    "red": (173, 35, 35),
    "blue": (42, 75, 215),
    "green": (29, 105, 20),
    "brown": (129, 74, 25),
    "purple": (129, 38, 192),
    "cyan": (41, 208, 208),
    "yellow": (255, 238, 51),
}
SHAPES = ("cube", "sphere", "cylinder")
MATERIALS = ("rubber", "metal")
SIZES = {"large": 0.7, "small": 0.35}  # radius in world units; objects are on a ground of 6 x 6

ATTRIBUTES = {"size": tuple(SIZES), "color": tuple(COLORS), "material": MATERIALS, "shape": SHAPES}
RELATIONS = ("left", "right", "front", "behind")

# The 28 answers of CLEVR v1.0.
ANSWERS = (
    "yes",
    "no",
    *(str(n) for n in range(11)),
    *COLORS,
    *SHAPES,
    *MATERIALS,
    "small",
    "large",
)
