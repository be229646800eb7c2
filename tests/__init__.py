"""The tests; test_<room>_<file>.py."""
