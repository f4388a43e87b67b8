"""Question types from the text alone, on sentences in the official wording."""

import pytest

from paligemma_jax.data.sources.question_families import OTHER, QUESTION_FAMILIES, question_family

OFFICIAL_STYLE = {
    "exist": [
        "Are there any large metallic cubes?",
        "Is there a tiny yellow matte thing?",
        "Are any shiny cylinders visible?",
        "There is a red ball; is there a green thing to the left of it?",
        "Is there anything else that has the same size as the brown sphere?",
        "Are there any other things that are made of the same material as the cyan block?",
        "Is there another big object of the same color as the rubber cylinder?",
        "Are there any other cubes of the same size as the matte ball?",
    ],
    "count": [
        "How many rubber things are there?",
        "What number of tiny objects are behind the purple block?",
        "There is a large sphere; what number of green things are in front of it?",
        "How many other objects have the same shape as the small gray object?",
        "What number of other things are there of the same material as the big cube?",
        "How many things are either red cylinders or tiny metal spheres?",
        "How many cubes are both left of the cyan thing and behind the red ball?",
    ],
    "equal_integer": [
        "Are there an equal number of big blocks and yellow metal things?",
        "Is the number of spheres behind the cube the same as the number of brown things?",
        "Are there the same number of tiny things in front of the red cube and green balls?",
    ],
    "less_than": ["Are there fewer cubes than matte things?", "Is the number of cubes less than the number of balls?"],
    "greater_than": ["Are there more cubes than balls?", "Is the number of cubes greater than the number of balls?"],
    "query_size": [
        "How big is the cyan rubber cylinder?",
        "What size is the other thing that is the same color as the cube?",
        "There is a gray sphere that is right of the red ball; how big is it?",
        "The other ball that is made of the same material as the green thing is what size?",
    ],
    "query_color": [
        "What color is the sphere?",
        "The big rubber thing has what color?",
        "What is the color of the object that is the same shape as the tiny metal thing?",
        "There is a shiny thing; what is its color?",
    ],
    "query_material": [
        "What is the red thing that is left of the ball made of?",
        "What material is the thing in front of the cube made of?",
        "There is another thing that is the same shape as the cube; what is it made of?",
        "The cube on the left side of the ball is made of what material?",
        "What is the big ball that is made of the same material as the cube made of?",
    ],
    "query_shape": ["What shape is the tiny thing?", "The purple object has what shape?"],
    "equal_size": [
        "Do the red cube and the blue ball have the same size?",
        "There is a cylinder; is its size the same as the ball that is behind the cube?",
        "Is the purple thing the same size as the ball?",
    ],
    "equal_color": [
        "Is the color of the cube the same as the ball?",
        "There is a tiny cube behind the ball; does it have the same color as the cylinder?",
    ],
    "equal_material": [
        "Are the cube and the large ball made of the same material?",
        "Is the cube made of the same material as the thing left of the ball?",
        "Does the cube have the same material as the ball?",
    ],
    "equal_shape": [
        "Does the red thing have the same shape as the big thing?",
        "There is a thing; is it the same shape as the ball?",
    ],
}


@pytest.mark.parametrize(("family", "text"), [(f, text) for f, texts in OFFICIAL_STYLE.items() for text in texts])
def test_official_wording(family, text):
    assert question_family(text) == family


def test_every_family_is_covered_and_other_texts_are_other():
    assert set(OFFICIAL_STYLE) == set(QUESTION_FAMILIES) and len(QUESTION_FAMILIES) == 13
    assert question_family("Why is the sky blue?") == OTHER
    assert question_family("") == OTHER
