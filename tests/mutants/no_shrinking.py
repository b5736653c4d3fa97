"""A plugin of pytest: hypothesis reports the first example that fails, as making it smaller takes minutes."""

from hypothesis import Phase, settings

settings.register_profile("no_shrinking", phases=[Phase.explicit, Phase.generate], database=None)
settings.load_profile("no_shrinking")  # the profile of tests/conftest.py builds on it
