"""Kills processes of a small run at random, starts it again until it is done, and compares with an undisturbed run."""
