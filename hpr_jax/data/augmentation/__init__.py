"""Augmentation: what happens to an image and its objects between the file and the batch.

The geometry of the weak view is drawn before the image is opened, everything else when the image is loaded.
May import the top of data.
"""
