"""The page, of Gradio, and what makes its films. Nothing else of the package imports it."""

from infworld.app import environment

environment.prepare()
