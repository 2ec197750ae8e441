"""A student for others: one folder in a format that its consumers know, complete or not there at all.

checks.py   what each consumer cannot read, and says so or does not
source.py   the student and the facts about its run
folder.py   writes a folder that appears whole, with checksums
hf.py  radio.py  timm.py  onnx.py  program.py    one format each
card.py     README.md of the folder
"""
