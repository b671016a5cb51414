"""Measures of films without a true film to compare with: plain functions of frames (T H W 3 uint8) and actions.

Each says its formula and where it is from. They know no model: a film of any other system can be measured as well.
They need the extra `metrics` (OpenCV for optical flow, SciPy for intervals).
"""
