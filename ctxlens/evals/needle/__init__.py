"""Needle in a haystack: does a model use a fact that stands in its context?"""
