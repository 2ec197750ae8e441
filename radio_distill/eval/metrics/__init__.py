"""The numbers of the evaluation suites: pure functions on tensors, and meters (`update`, `reduce`, `compute`) for whole sets.

Nothing here knows a dataset, a model or a file. Every rule is the reference implementation's, oddities included, because
published numbers inherit them; cleaner variants have other names. One module per suite; percentages are 0 to 100.
"""
