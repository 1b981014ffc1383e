"""One thread for every test of recipes."""

from recipe_models import one_thread  # noqa: F401
