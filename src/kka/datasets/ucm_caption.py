"""UCM-Caption: 2,100 aerial photographs in 21 land-use classes, five sentences each; two classes are normal.

Images by Yang and Newsam (2010), sentences by Qu et al. (2016). Folders 1..21 are the classes in
alphabetical order; 20 is storage tanks and 21 is tennis court.
"""

from kka.datasets.layout import DataSetSpec, UserDict, normal_folders

# {0: training folders, 1: test folders}; folder 0 holds the generated anomalies.
user_dict: UserDict = {0: [21, 20, 0], 1: list(range(1, 22))}
# Test on the generated anomalies instead, to see which of them are hard (--iterate).
iterating_user_dict: UserDict = {0: user_dict[0], 1: user_dict[0]}

SPEC = DataSetSpec(
    name="ucm_caption",
    title="UCM-Caption",
    normal_classes=normal_folders(user_dict),
    user_dict=user_dict,
    iterating_user_dict=iterating_user_dict,
    caption_stem="caption_sentence",
    captions_per_image=5,
    prompt=(
        "Describe one aerial image that shows another use of the land than the ones below. Answer "
        "with one sentence only, in exactly the structure and style of these "
        "descriptions:\n{examples}"
    ),
    n_epochs=300,
)
