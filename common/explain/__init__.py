"""Explanations: attribution maps, their checks, and the tiles that they are drawn for."""
