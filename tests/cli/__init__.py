"""Tests of the command line, with what they share in conftest.py."""
