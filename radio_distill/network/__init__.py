"""The student's network, alone: these files import each other, torch and timm, and travel as they are with every export.

arch.py      its sizes as plain values
student.py   the whole: pixels to summary and map, and what adaptors predict
vit.py  patch_generator.py  vitdet.py  normalizers.py  adaptors.py    its parts
intermediates.py  stages.py  packing.py  token_merging.py  scale.py   other ways to run it
output.py    what every encoder returns

Files lie side by side in an export, so an import is `from .FILE import NAME`, and packages that may be missing go through
import_module: transformers reads the imports of these files before it runs them.
"""
