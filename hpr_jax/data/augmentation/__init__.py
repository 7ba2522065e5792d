"""What happens to an image and its objects between file and batch.

Geometry is drawn before an image is opened; the rest when it is loaded.
May import the top of data.
"""
