"""Oxford-102: 8,189 flower photographs in 102 classes, ten captions each; one class is normal.

Images by Nilsback and Zisserman (2008), captions by Reed et al. (2016). Class 26 is the official code's
normal class; the paper's Gaura is class 57 of the official labels.
"""

from kka.datasets.layout import DataSetSpec, UserDict, normal_folders

# {0: training folders, 1: test folders}; folder 0 holds the generated anomalies.
user_dict: UserDict = {0: [26, 0], 1: [26, *(i for i in range(1, 103) if i != 26)]}
# Test on the generated anomalies instead, to see which of them are hard (--iterate).
iterating_user_dict: UserDict = {0: user_dict[0], 1: user_dict[0]}

SPEC = DataSetSpec(
    name="flower",
    title="Oxford-102",
    normal_classes=normal_folders(user_dict),
    user_dict=user_dict,
    iterating_user_dict=iterating_user_dict,
    caption_stem="text_caption",
    captions_per_image=10,
    prompt=(
        "Describe one flower of another kind than the ones below. Answer with one sentence only, in "
        "exactly the structure and style of these descriptions:\n{examples}"
    ),
    n_epochs=200,
)
