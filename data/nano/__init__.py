"""The nano model's world: problem families, proposal texts, and the commands that build and train
on them.
"""
