"""Adapter files of other tools: LyCORIS, kohya's trainers, and LoRA files as PEFT and diffusers name them.

layouts.py    the table of layouts, from which all else is derived
places.py     names in files and modules of a model
read.py       file → adapter
write.py      adapter → file
"""
