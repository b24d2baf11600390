"""The picture of a confusion matrix."""

import numpy as np

from data2vec_vision.pictures import NAMED_CLASSES, RIGHT, WRONG, confusion_picture, shade


def cell(page, classes, row, column):
    """The colour of a cell's corner, counted from the picture's lower right."""
    side = 34
    right, bottom = page.width - 12, page.height - 12
    return page.getpixel((right - (classes - column) * side + 2, bottom - (classes - row) * side + 2))


def test_rows_are_shares_of_the_true_class_right_ones_green_wrong_ones_red():
    counts = np.zeros((20, 20), int)
    counts[0, 0], counts[0, 1], counts[1, 1], counts[2, 1] = 3, 1, 50, 7
    page = confusion_picture(counts, [f"class {n}" for n in range(20)], "title")
    assert cell(page, 20, 0, 0) == shade(0.75, RIGHT) and cell(page, 20, 0, 1) == shade(0.25, WRONG)
    assert cell(page, 20, 1, 1) == RIGHT and cell(page, 20, 2, 1) == WRONG  # whatever their number
    assert cell(page, 20, 2, 2) == (255, 255, 255) == cell(page, 20, 19, 19)


def test_many_classes_and_long_names_stay_within_a_screen():
    many = confusion_picture(np.eye(1000, dtype=int), [str(n) for n in range(1000)], "t")
    named = confusion_picture(np.eye(NAMED_CLASSES, dtype=int), ["a very long name " * 9] * NAMED_CLASSES, "t")
    assert max(many.size) < 1200 and max(named.size) < 1700
