"""`vitask run`: a recipe, from images to a judged specialist. Recipe -> plan of commands -> engine that runs them."""
