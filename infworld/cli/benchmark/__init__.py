"""`infworld benchmark`: a harness that measures, parts that say what, a record of the figures; `run` is the door."""
