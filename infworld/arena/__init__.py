"""The arena: people see two films of the same picture and actions side by side, blind, and say which is better."""
