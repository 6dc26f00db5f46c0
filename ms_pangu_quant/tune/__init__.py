"""A target in the place of a recipe: candidates are tried until the best that meets it is found."""
