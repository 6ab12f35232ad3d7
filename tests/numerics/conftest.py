"""Property tests draw the same examples every time and have no deadline: the machine may be busy."""

from hypothesis import settings

settings.register_profile("numerics", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("numerics")
