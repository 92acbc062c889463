"""CIFAR-100: 60,000 pictures of 32 x 32 in 100 fine classes and 20 superclasses; one superclass is normal.

Images by Krizhevsky (2009). Folders are the fine labels, except that fine label 0 (apple) is folder 100,
because folder 0 holds the generated anomalies. Captions are made from the fine label, one per image.
"""

from kka.datasets.layout import DataSetSpec, UserDict, normal_folders

# {0: training folders, 1: test folders}; folder 0 holds the generated anomalies.
user_dict: UserDict = {0: [5, 20, 25, 84, 94, 0], 1: list(range(1, 101))}
# Test on the generated anomalies instead, to see which of them are hard (--iterate).
iterating_user_dict: UserDict = {0: user_dict[0], 1: user_dict[0]}

superclasses: dict[str, tuple[int, ...]] = {
    "aquatic_mammals": (4, 30, 55, 72, 95),
    "fish": (1, 32, 67, 73, 91),
    "flowers": (54, 62, 70, 82, 92),
    "food_containers": (9, 10, 16, 28, 61),
    "fruit_and_vegetables": (51, 53, 57, 83, 100),
    "household_electrical_devices": (22, 39, 40, 86, 87),
    "household_furniture": (5, 20, 25, 84, 94),
    "insects": (6, 7, 14, 18, 24),
    "large_carnivores": (3, 42, 43, 88, 97),
    "large_man-made_outdoor_things": (12, 17, 37, 68, 76),
    "large_natural_outdoor_scenes": (23, 33, 49, 60, 71),
    "large_omnivores_and_herbivores": (15, 19, 21, 31, 38),
    "medium_mammals": (34, 63, 64, 66, 75),
    "non-insect_invertebrates": (26, 45, 77, 79, 99),
    "people": (2, 11, 35, 46, 98),
    "reptiles": (27, 29, 44, 78, 93),
    "small_mammals": (36, 50, 65, 74, 80),
    "trees": (47, 52, 56, 59, 96),
    "vehicles_1": (8, 13, 48, 58, 90),
    "vehicles_2": (41, 69, 81, 85, 89),
}

SPEC = DataSetSpec(
    name="cifar100",
    title="CIFAR-100",
    normal_classes=normal_folders(user_dict),
    user_dict=user_dict,
    iterating_user_dict=iterating_user_dict,
    caption_stem="caption_sentence",
    captions_per_image=1,
    prompt=(
        "Describe one photo of something else than what the photos below show. Answer with one "
        "sentence only, in exactly the structure and style of these descriptions:\n{examples}"
    ),
    n_epochs=150,
    n_initial=1000,
    n_updates=3,
    caption_repeats=10,
    superclasses=superclasses,
)
